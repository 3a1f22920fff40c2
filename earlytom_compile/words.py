"""Numbers in sentences, for everything that people read.

counted(1, "row"), counted(2, "row")   ->   "1 row", "2 rows"
"""


def counted(number: int, what: str) -> str:
    """``"1 row"``, ``"2 rows"``; ``what`` is a word whose plural ends in s."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
