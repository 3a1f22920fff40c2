"""The full and the compressed model on the same inputs: two answers, two times to the first token, one table.

                          full model     compressed
    frames                32             32 -> 24 -> 18 -> 14
    video tokens          1568           157
    time to first token   1012 ms        203 ms (5.0x faster)

The time to the first token is that of ``generate(max_new_tokens=1)``: vision encoder, prefill and one greedy
token, from inputs already on the device. Both models are warm and run in turn, and the median counts. They
share their weights, and of both Inductor compiles the vision encoder and the language model's pass over the
prompt: what differs is the compression.
"""

import itertools
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import earlytom_compile

from ..benchmarks.arms import twin_of
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..families.registry import family_of
from ..integrations.prefill import CompiledPrefill
from ..reused import ComputedPatches, patches_of
from .loading import Inputs, Loaded, progress_bars

_WARM_UP = 1  # the first answer was one already
_TEXT_WIDTH = 60
EMPTY = "(empty answer)"


@dataclass(frozen=True)
class Arm:
    """One of the two models: its answer, and how long the first answer and later first tokens took."""

    answer: list[int]
    text: str
    first_seconds: float
    ttft_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both models, and what the compressed one reports (a dictionary, and the text of it)."""

    full: Arm
    compressed: Arm
    report: dict[str, Any]
    explanation: str

    @property
    def common_tokens(self) -> int:
        """Tokens the two answers share before they first differ."""
        pairs = zip(self.full.answer, self.compressed.answer, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def agree(self) -> bool:
        """Whether both answers are the same, token by token."""
        return self.full.answer == self.compressed.answer


class BothModels:
    """``loaded.model``, compiled with ``options`` of ``earlytom_compile.compile``, and a full twin of it.

    Made once for any number of questions: of a model that is compressed there is no full twin to be had.
    """

    def __init__(self, loaded: Loaded, options: dict[str, Any]) -> None:
        config = EarlyTomConfig.from_options(options)
        compiled = config.lowering != "eager"
        self._loaded = loaded
        self._full = full_model(loaded.model, compiled=compiled)
        self._prefill = None
        if compiled and config.compile_llm:
            self._prefill = CompiledPrefill(self._full.model.language_model, config.lowering)
        self._compressed = earlytom_compile.compile(loaded.model, **options)

    def compare(self, inputs: Inputs, *, max_new_tokens: int, repeats: int, progress_on: Console) -> Comparison:
        """Answer the prompt of ``inputs`` with both models and time them."""
        if repeats < 1:
            raise EarlyTomConfigError(f"repeats={repeats}: must be at least 1.")
        models = {"compressed": self._compressed, "full": self._full}
        answers, seconds = {}, {}
        with progress_bars(progress_on) as progress, ExitStack() as stack:
            if self._prefill is not None:
                stack.enter_context(self._prefill.active(inputs["attention_mask"]))
            for name, model in models.items():
                task = progress.add_task(f"{name} model: compile and answer", total=None)
                answers[name], seconds[name] = timed_answer(model, inputs, max_new_tokens)
                progress.update(task, total=1, completed=1)
                if name == "compressed":
                    # Read now: Dynamo counts graph breaks for the whole process, the other model's included.
                    report = earlytom_compile.report(model)
                    content, explanation = report.to_dict(), str(report)
            first_token = _first_token_seconds(models, inputs, repeats, progress)
        full, compressed = (
            Arm(answers[name], decode(self._loaded, answers[name]), seconds[name], first_token[name])
            for name in ("full", "compressed")
        )
        return Comparison(full, compressed, content, explanation)


def full_model(model: Any, *, compiled: bool) -> Any:
    """A second model that shares the weights, compresses nothing, and whose vision encoder plain Inductor compiles."""
    twin: Any = earlytom_compile.restore(twin_of(model))
    if compiled:
        family_of(twin).vision_tower(twin).compile()
    return twin


def timed_answer(model: Any, inputs: Inputs, max_new_tokens: int) -> tuple[list[int], float]:
    """Greedy answer to the only prompt of ``inputs``: its new tokens, and the seconds they took."""
    if max_new_tokens < 1:
        raise EarlyTomConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1.")
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    return new, time.perf_counter() - start


def decode(loaded: Loaded, tokens: list[int]) -> str:
    """The answer as text."""
    return loaded.processor.decode(tokens, skip_special_tokens=True).strip()


def _first_token_seconds(models: dict[str, Any], inputs: Inputs, repeats: int, progress: Progress) -> dict[str, float]:
    """Median over ``repeats`` runs in turn, so that what else the machine does meets both models alike."""
    task = progress.add_task("timing the first token", total=(_WARM_UP + repeats) * len(models))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for run in range(_WARM_UP + repeats):
        for name, model in models.items():
            _, elapsed = timed_answer(model, inputs, 1)
            if run >= _WARM_UP:
                seconds[name].append(elapsed)
            progress.advance(task)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def comparison_table(comparison: Comparison) -> Table:
    """The table that ``earlytom demo`` and ``earlytom run --compare`` end in."""
    full, compressed, report = comparison.full, comparison.compressed, comparison.report
    table = Table(title="Full and compressed", title_justify="left")
    for heading in ("", "full model", "compressed"):
        table.add_column(heading, overflow="fold")
    videos = report["videos"]
    for index, video in enumerate(videos):
        which = f" of video {index + 1}" if len(videos) > 1 else ""
        frames, (before, after) = video["frames"], video["tokens"]
        table.add_row(f"frames{which}", str(frames[0]), " -> ".join(map(str, frames)))
        if "patches" in video:
            patches = ComputedPatches(**video["patches"])
            table.add_row(f"patches computed{which}", f"{patches.every:,}", patches.in_short())
        table.add_row(f"video tokens{which}", str(before), f"{after} ({after / before:.1%})")
    if videos:
        before, after = report["prompt"]
        table.add_row("prompt length", f"{before} tokens", f"{after} tokens")
    else:
        table.add_row("video tokens", "all", "[bold red]all: this call ran uncompressed[/]")
    table.add_row("time to first token", *_times(full.ttft_seconds, compressed.ttft_seconds))
    table.add_row("first answer", f"{full.first_seconds:.1f} s", f"{compressed.first_seconds:.1f} s")
    table.add_row("answer", *(_quoted(arm.text) for arm in (full, compressed)))
    length = max(len(full.answer), len(compressed.answer))
    apart = f"no, the first {comparison.common_tokens} of {length} tokens do"
    table.add_row("answers agree", "", "yes" if comparison.agree else apart)
    notes = [_encoding(report)] if videos else []
    notes.append("The first answer includes compilation.")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _encoding(report: dict[str, Any]) -> str:
    """What the vision encoder saved itself, in a sentence: patches that it reused, or frames that became one."""
    patches = patches_of(report)
    if any(each.reused for each in patches):
        return "Patches that did not change since they were computed were not computed again."
    if patches:
        return "Too many patches changed for any to be reused."
    frames = [video["frames"] for video in report["videos"]]
    layers = [
        str(layer)
        for step, layer in enumerate(report["merge_layers"])
        if any(counts[step + 1] < counts[step] for counts in frames)
    ]
    if not layers:
        return "No two frames look enough alike to merge."
    return f"Frames merged after vision encoder layer{'s' * (len(layers) > 1)} {', '.join(layers)}."


def _times(full: float, compressed: float) -> tuple[str, str]:
    ratio = full / compressed
    change = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    return f"{1000 * full:.0f} ms", f"{1000 * compressed:.0f} ms ({change})"


def _quoted(text: str) -> str:
    if not text:
        return EMPTY
    shown = text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 3] + "..."
    return escape(repr(shown))
