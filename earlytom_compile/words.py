"""Numbers and errors in sentences, for everything that people read.

counted(1, "row"), counted(2, "row")   ->   "1 row", "2 rows"
sentence("it broke")                    ->   "it broke."
what_ended(SystemExit(0))               ->   "the task ended the process"
"""


def counted(number: int, what: str) -> str:
    """``"1 row"``, ``"2 rows"``; ``what`` is a word whose plural ends in s."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def sentence(text: str) -> str:
    """``text`` with a full stop, unless it ends already: what somebody else's error says is no sentence."""
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def what_ended(exit: SystemExit) -> str:
    """What a task's own ``sys.exit`` says, whose argument may be a message, a number or nothing."""
    said = exit.code
    why = "" if said in (None, 0) else f" with exit code {said}" if isinstance(said, int) else f": {said}"
    return f"the task ended the process{why}"
