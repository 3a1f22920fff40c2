"""Questions about videos of one's own, in a file: CSV with a header, or JSON Lines with the same names.

    video,question,answer                      {"video": "a.mp4", "question": "Who speaks?", "answer": "Ann"}
    a.mp4,Who speaks?,Ann                      {"video": "sub/b.mp4", "question": "Who is it, and where?"}
    sub/b.mp4,"Who is it, and where?",

``video`` is a path inside the folder of videos (or an absolute one); ``answer``, the true one, may be left out.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EarlyTomConfigError
from .loading import require_question

_COLUMNS = ("video", "question", "answer")
_CHOICE = re.compile(r"\(?([a-z])(?:$|[).:,])")
_EXAMPLE = 'CSV with the header "video,question" or "video,question,answer", or one JSON object with these names a line'


@dataclass(frozen=True)
class Question:
    """One question about one video; ``video`` as it stands in the file, ``path`` where it is."""

    video: str
    path: Path
    text: str
    answer: str | None = None

    def is_right(self, text: str) -> bool | None:
        """Whether an answer says what the true one says, but for case, spaces and the mark at its end; of a choice
        (A, B, ...) the letter alone is compared. None where the true answer is not known."""
        if self.answer is None:
            return None
        truth, given = _plain(self.answer), _plain(text)
        if len(truth) == 1 and truth.isalpha():
            chosen = _CHOICE.match(given)
            given = chosen[1] if chosen else given
        return truth == given


def read_questions(file: str | Path, videos: str | Path) -> list[Question]:
    """All questions, those about one video together, else in the order of the file.

    Raises :class:`EarlyTomConfigError` for a file that is not there or not of this format, and for videos that are
    not in the folder ``videos``.
    """
    file, folder = Path(file).expanduser(), Path(videos).expanduser()
    if not folder.is_dir():
        raise EarlyTomConfigError(f"videos={str(folder)!r}: there is no such folder.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise EarlyTomConfigError(f"questions={str(file)!r} cannot be read: {reason}. Give {_EXAMPLE}.") from error
    rows = _json_lines(text, file) if text.lstrip().startswith("{") else _csv(text, file)
    questions = [_question(row, folder, f"{file}, line {line}") for line, row in rows]
    if not questions:
        raise EarlyTomConfigError(f"questions={str(file)!r} has no question in it: give {_EXAMPLE}.")
    missing = list(dict.fromkeys(question.video for question in questions if not question.path.is_file()))
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EarlyTomConfigError(f"{str(folder)!r} has no video {missing[0]!r}{others}: see {str(file)!r}.")
    first = {path: place for place, path in reversed(list(enumerate(question.path for question in questions)))}
    return sorted(questions, key=lambda question: first[question.path])


def _csv(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    if not {"video", "question"} <= set(header):
        raise EarlyTomConfigError(f"questions={str(file)!r} begins with {','.join(header)!r}: give {_EXAMPLE}.")
    reader.fieldnames = header
    for row in reader:
        yield reader.line_num, row


def _json_lines(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EarlyTomConfigError(f"{file}, line {number} is not JSON: {error}. Give {_EXAMPLE}.") from error
            if not isinstance(row, dict):
                raise EarlyTomConfigError(f"{file}, line {number} is no JSON object. Give {_EXAMPLE}.")
            yield number, row


def _question(row: dict[str, Any], folder: Path, where: str) -> Question:
    unknown = [str(name) for name in row if name not in _COLUMNS]
    if unknown:
        hint = "Put quotes around text with a comma." if None in row else f"There are {', '.join(_COLUMNS)}."
        raise EarlyTomConfigError(f"{where} has more than it may: {', '.join(unknown)}. {hint}")
    values = {name: "" if row.get(name) is None else str(row[name]).strip() for name in _COLUMNS}
    for name in ("video", "question"):
        if not values[name]:
            raise EarlyTomConfigError(f"{where} has no {name}: give {_EXAMPLE}.")
    try:
        require_question(values["question"])
    except EarlyTomConfigError as error:
        raise EarlyTomConfigError(f"{where}: {error}") from error
    path = folder / Path(values["video"]).expanduser()
    return Question(values["video"], path, values["question"], values["answer"] or None)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")
