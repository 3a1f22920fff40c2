"""Which setting to take: what :mod:`.compare` measured, counted, and put into a table and a sentence.

summary = summarize(rows, Setting("plus", 0.1))
recommended([summary, ...])         # the fewest tokens that keep 95 % of the answers, or None
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

KEPT = 0.95
"""A setting is recommended if it keeps this share of the full model's answers, or of its right ones."""
_ENOUGH = 30  # questions, below which a recommendation says how little they are
_SURE = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Setting:
    """What is chosen between."""

    variant: str
    retain_ratio: float

    @property
    def name(self) -> str:
        """``"plus 25 %"``."""
        return f"{self.variant} {100 * self.retain_ratio:g} %"


@dataclass(frozen=True)
class Summary:
    """A setting over all questions; rates are counts, so that nobody takes 3 of 3 for certain."""

    setting: Setting
    questions: int
    agree: int
    right: int | None
    full_right: int | None
    lost: float
    tokens: float
    full_tokens: float
    seconds: float
    full_seconds: float

    @property
    def kept(self) -> float:
        """Share of the full model's answers that stay the same; where the true ones are known, right answers against
        the full model's, which may be above 1."""
        if self.right is None or not self.full_right:
            return self.agree / self.questions
        return self.right / self.full_right

    @property
    def speedup(self) -> float:
        """How many times faster the first token comes."""
        return self.full_seconds / self.seconds


def summarize(rows: Sequence[dict[str, Any]], setting: Setting) -> Summary:
    """One setting over all rows."""
    full, cut = [row["full"] for row in rows], [row["settings"][setting.name] for row in rows]
    truth = [place for place, answer in enumerate(full) if answer["right"] is not None]
    return Summary(
        setting,
        questions=len(rows),
        agree=sum(answer["agrees"] for answer in cut),
        right=sum(cut[place]["right"] for place in truth) if truth else None,
        full_right=sum(full[place]["right"] for place in truth) if truth else None,
        lost=statistics.fmean(answer["lost"] for answer in cut),
        tokens=statistics.fmean(answer["video_tokens"] for answer in cut),
        full_tokens=statistics.fmean(answer["video_tokens"] for answer in full),
        seconds=statistics.median(answer["seconds"] for answer in cut),
        full_seconds=statistics.median(answer["seconds"] for answer in full),
    )


def recommended(summaries: Sequence[Summary]) -> Summary | None:
    """The setting with the fewest tokens that keeps :data:`KEPT` of the full model's answers (of its right answers,
    where the true ones are known); of equally many tokens the one that keeps more, then the one that loses less. None
    if no setting keeps so much."""
    enough = [summary for summary in summaries if summary.kept >= KEPT]
    return min(enough, key=lambda summary: (summary.tokens, -summary.kept, summary.lost), default=None)


def recommendation(summaries: Sequence[Summary]) -> str:
    """:func:`recommended` in words, with its numbers."""
    best = recommended(summaries)
    shown = best or max(summaries, key=lambda summary: (summary.kept, -summary.lost, -summary.tokens))
    setting, share = shown.setting, shown.tokens / shown.full_tokens
    arguments = f"variant={setting.variant!r}, retain_ratio={setting.retain_ratio:g}"
    numbers = (
        f"{_quality(shown)}, {nats(shown.lost, 3)} nats a token lost, {share:.1%} of the video tokens, first token "
        f"{faster(shown.speedup)}"
    )
    if best is not None:
        text = f"Take {arguments}: the fewest tokens with at least {KEPT:.0%} of the quality. {numbers}."
    else:
        text = (
            f"None of these keeps {KEPT:.0%} of the full model's quality. Nearest: {arguments}. {numbers}. Try larger "
            "--retain-ratios."
        )
    if shown.questions < _ENOUGH:
        text += f" {shown.questions} question(s) say little: ask {_ENOUGH} or more before you rely on it."
    return text


def interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate: what it may be where ``of`` is small."""
    rate, square = hits / of, _SURE**2
    middle = (rate + square / (2 * of)) / (1 + square / of)
    half = _SURE / (1 + square / of) * (rate * (1 - rate) / of + square / (4 * of**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def nats(value: float, digits: int) -> str:
    """Without a minus before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _quality(summary: Summary) -> str:
    agree = f"same answers {_rate(summary.agree, summary.questions)}"
    if summary.right is None:
        return agree
    return f"{summary.right} right answers against the full model's {summary.full_right}, {agree}"


def _rate(hits: int, of: int) -> str:
    low, high = interval(hits, of)
    return f"{hits} of {of} ({low:.0%} to {high:.0%})"


def faster(speedup: float) -> str:
    """``"2.1x faster"``, ``"1.3x slower"``."""
    return f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"


def settings_table(summaries: Sequence[Summary]) -> Table:
    """All tokens in the first row, then one setting each."""
    table = Table(title="All tokens and fewer", title_justify="left", caption_justify="left")
    with_truth = summaries[0].right is not None
    columns = ["setting", "video tokens", "same answers", "lost", "first token"]
    if with_truth:
        columns.insert(2, "right answers")
    for column in columns:
        table.add_column(column, overflow="fold")
    first = summaries[0]
    cells = ["all tokens", f"{first.full_tokens:.0f}", "", "", f"{1000 * first.full_seconds:.0f} ms"]
    if with_truth:
        cells.insert(2, str(first.full_right))
    table.add_row(*cells)
    for one in summaries:
        cells = [
            one.setting.name,
            f"{one.tokens:.0f} ({one.tokens / one.full_tokens:.1%})",
            _rate(one.agree, one.questions),
            nats(one.lost, 3),
            f"{1000 * one.seconds:.0f} ms ({faster(one.speedup)})",
        ]
        if with_truth:
            cells.insert(2, str(one.right))
        table.add_row(*cells)
    table.caption = (
        "same answers: as the full model's, with the 95 % interval. lost: log-probability of the full model's answers, "
        "mean in nats a token (0: none, 0.7: half as likely). first token: median, all models in turn."
    )
    return table
