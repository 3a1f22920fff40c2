"""Tables for documents, and what numbers need beside them.

table("one model:", ["arm", "ms"], [["inductor", "2902"]])   ->   | arm | ms |
                                                                  | --- | --- |
                                                                  | inductor | 2902 |
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def heading(about: Mapping[str, Any]) -> list[str]:
    """The command of :func:`environment`, and everything else it knows."""
    beside = ", ".join(f"{name} {value}" for name, value in about.items() if name != "command")
    return [f"`{about['command']}`", "", beside, ""]


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table with an empty one behind it."""
    return [f"{title}:", "", _row(headings), _row(["---"] * len(headings)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
