"""``earlytom compare``: what fewer tokens cost in answers and save in time, on a model, videos and questions of one's
own, and which setting to take.

    earlytom compare --model path/or/hub-id --videos clips --questions questions.csv --retain-ratios 0.25,0.1

Every question is answered with all tokens and with each setting, in turn. What is compared:

* *agreement*: the answer reads as the full model's does;
* *lost*: let a_1 … a_T be the tokens of the full model's greedy answer, its end included, and p(a_t | ...) what a model
  gives a_t behind the prompt and a_1 … a_{t-1} (teacher forcing; softmax of the model's own logits, before anything
  that ``generate`` does to them). The log-probability lost on this answer is

      1/T · Σ_t [ log p_full(a_t | prompt, a_<t) - log p_setting(a_t | cut prompt, a_<t) ]        in nats a token,

  and that of a setting the mean over all answers. 0: nothing lost; 0.7: each token half as likely; below 0: likelier;
* *time*: to the first token of the answer, from inputs that are on the device, median over the questions. The first
  call for each length of video is not counted, since it compiles.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

import earlytom_compile

from ..benchmarks.arms import twin_of
from ..benchmarks.environment import environment
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..integrations.prefill import CompiledPrefill
from .comparison import decode, full_model
from .loading import (
    Inputs,
    Loaded,
    ask_again,
    frames_in,
    keeps_places,
    of_the_video,
    open_checkpoint,
    prepare_inputs,
    progress_bars,
)
from .outputs import STANDARD_OUTPUT, check_outputs, output_console, write_text
from .quality import Setting, nats, recommendation, recommended, settings_table, summarize
from .questions import Question, read_questions
from .toolchain import require_toolchain

_TEXT_WIDTH = 40


@dataclass(frozen=True)
class Answer:
    """What one model says to one question."""

    text: str
    tokens: list[int]
    log_probabilities: list[float]
    """Of the full model's answer, token by token, in nats."""
    seconds: float
    """To the first token."""
    video_tokens: int
    right: bool | None


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Ask everything; print and write what came out."""
    settings = _settings(arguments, options)
    if arguments.max_new_tokens < 1:
        raise EarlyTomConfigError(f"max_new_tokens={arguments.max_new_tokens}: must be at least 1.")
    check_outputs(arguments)
    questions = read_questions(arguments.questions, arguments.videos)
    about = _about(arguments, options)
    rows = _resumed(arguments, about, settings)
    progress_on, console = Console(stderr=True), output_console(arguments)
    first = {**options, **asdict(settings[0])}
    checkpoint = open_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype, options=first)
    require_toolchain(checkpoint.device, first)
    _look_at_videos(questions, arguments.frames, progress_on)
    loaded = checkpoint.load(progress_on)
    about["environment"] = environment(loaded.device)
    console.print(_introduction(questions, settings, options, len(rows)), markup=False, soft_wrap=True)
    done = {(row["video"], row["question"]) for row in rows}
    asker = Asker(loaded, settings, options, max_new_tokens=arguments.max_new_tokens)
    to_ask = [question for question in questions if (question.video, question.text) not in done]
    try:
        for row in asker.ask_all(to_ask, arguments.frames, progress_on):
            rows.append(row)
            console.print(_line(row, len(rows), len(questions)), markup=False, soft_wrap=True)
            _save(arguments.json, about, rows, settings, finished=len(rows) == len(questions))
    except KeyboardInterrupt:
        saved = arguments.json and arguments.json != STANDARD_OUTPUT
        where = f"{arguments.json} has them, --resume goes on" if saved else "nothing is saved without --json FILE"
        if saved and not rows:
            where = f"{arguments.json} has nothing yet"
        raise KeyboardInterrupt(f"{len(rows)} of {len(questions)} questions were answered: {where}.") from None
    summaries = [summarize(rows, setting) for setting in settings]
    console.print(settings_table(summaries))
    console.print(recommendation(summaries), markup=False, soft_wrap=True)
    for reason in asker.reasons():
        console.print(f"left alone: {reason}", markup=False, soft_wrap=True)


def _look_at_videos(questions: Sequence[Question], frames: int | None, progress_on: Console) -> None:
    """Raise :class:`EarlyTomConfigError` for a video that cannot be read or has fewer frames than the user asks for."""
    from ..integrations.video import read_video

    with progress_bars(progress_on) as progress:
        progress.add_task("looking at the videos", total=None)
        for path in dict.fromkeys(question.path for question in questions):
            total = read_video(path, 1).total
            if frames is not None and total < frames:
                raise EarlyTomConfigError(
                    f"{str(path)!r} has {total} frame(s), fewer than the {frames} asked for: leave out --frames to "
                    "take what each video has."
                )


class Asker:
    """The full model and one twin for each setting, all with the same weights."""

    def __init__(
        self, loaded: Loaded, settings: Sequence[Setting], options: dict[str, Any], *, max_new_tokens: int
    ) -> None:
        config = EarlyTomConfig.from_options({**options, **asdict(settings[0])})
        compiled = config.lowering != "eager"
        self._loaded = loaded
        self._max_new_tokens = max_new_tokens
        self._full = full_model(loaded.model, compiled=compiled)
        self._prefill: CompiledPrefill | None = None  # of the full model, compiled where the others' is
        if compiled and config.compile_llm:
            self._prefill = CompiledPrefill(self._full.model.language_model, config.lowering, config.mode)
        self._twins = {
            setting: earlytom_compile.compile(twin_of(loaded.model), **{**options, **asdict(setting)})
            for setting in settings
        }
        self._warm: set[tuple[tuple[int, ...], int]] = set()

    def ask_all(self, questions: Sequence[Question], frames: int | None, progress_on: Console) -> Any:
        """Yields a row, as it is written to the file, for each question; those about one video must be together."""
        first: Inputs | None = None
        for place, question in enumerate(questions):
            if place == 0 or question.path != questions[place - 1].path:
                first = prepare_inputs(
                    self._loaded,
                    question.path,
                    question.text,
                    frames=frames,
                    default_frames=self._loaded.frames,
                    progress_on=progress_on,
                )
                encoded: dict[Setting, Any] = {}
            assert first is not None
            inputs = ask_again(self._loaded, first, question.text)
            with progress_bars(progress_on) as progress:
                progress.add_task(f"{question.video}: {question.text[:_TEXT_WIDTH]}", total=None)
                yield self._ask(question, inputs, encoded)

    def reasons(self) -> list[str]:
        """Why calls ran with all tokens, if any did."""
        reports = [earlytom_compile.report(twin).to_dict() for twin in self._twins.values()]
        return list(dict.fromkeys(reason for report in reports for reason in report["reasons"]))

    def _ask(self, question: Question, inputs: Inputs, encoded: dict[Setting, Any]) -> dict[str, Any]:
        self._warm_up(inputs)
        full = self._answer(self._full, question, inputs)
        answers = {}
        for setting, twin in self._twins.items():
            answer = self._answer(twin, question, inputs)
            videos = earlytom_compile.report(twin).to_dict()["videos"]
            if setting not in encoded:
                encoded[setting] = earlytom_compile.encode_videos(twin, **of_the_video(inputs))
            scored = {**inputs, "pixel_values_videos": encoded[setting]}
            answers[setting] = {
                **asdict(answer),
                "log_probabilities": log_probabilities(twin, scored, full.tokens),
                "video_tokens": sum(video["tokens"][1] for video in videos) or full.video_tokens,
                "agrees": answer.text == full.text,
            }
        return {
            "video": question.video,
            "question": question.text,
            "answer": question.answer,
            "full": asdict(full),
            "settings": {
                setting.name: {**answer, "lost": _lost(full.log_probabilities, answer["log_probabilities"])}
                for setting, answer in answers.items()
            },
        }

    def _warm_up(self, inputs: Inputs) -> None:
        shape = tuple(inputs["pixel_values_videos"].shape), frames_in(inputs)
        if shape not in self._warm:
            for model in (self._full, *self._twins.values()):
                self._generate(model, inputs, max_new_tokens=min(2, self._max_new_tokens))
            self._warm.add(shape)

    def _generate(self, model: Any, inputs: Inputs, **choices: Any) -> Any:
        prefill = self._prefill if model is self._full else None
        with nullcontext() if prefill is None else prefill.active(inputs["attention_mask"]):
            return model.generate(**inputs, **choices, do_sample=False, num_beams=1)

    def _answer(self, model: Any, question: Question, inputs: Inputs) -> Answer:
        clock = _FirstToken()
        output = self._generate(
            model,
            inputs,
            max_new_tokens=self._max_new_tokens,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = decode(self._loaded, tokens)
        placeholders = int((inputs["input_ids"] == self._loaded.model.config.video_token_id).sum())
        return Answer(
            text,
            tokens,
            _chosen(torch.cat(output.logits), tokens),
            clock.seconds,
            placeholders - (not keeps_places(inputs)),  # a newline behind it
            question.is_right(text),
        )


@torch.no_grad()
def log_probabilities(model: Any, inputs: Inputs, answer: Sequence[int]) -> list[float]:
    """log p(a_t | prompt, a_<t) of each token of ``answer``, in nats, in one call of ``model``.

    ``inputs``: those of one prompt; the videos as pixels or, for a compiled model, as encoded ones.
    """
    before = torch.tensor([list(answer[:-1])], dtype=torch.int64, device=inputs["input_ids"].device)
    longer = {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], before), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(before)), dim=1),
    }
    if "mm_token_type_ids" in inputs:  # the answer is text
        longer["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(before)), dim=1)
    logits = model(**longer, logits_to_keep=len(answer)).logits
    return _chosen(logits[0], answer)


def _chosen(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """log softmax of ``logits`` [T, vocabulary] at ``tokens``."""
    every = logits.float().log_softmax(-1)
    return every[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def _lost(full: Sequence[float], cut: Sequence[float]) -> float:
    return statistics.fmean(before - after for before, after in zip(full, cut, strict=True))


class _FirstToken(BaseStreamer):
    """Seconds from now to the first new token; ``generate`` hands on the prompt before it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._calls = 0
        self.seconds = 0.0

    def put(self, value: Any) -> None:
        """The prompt, then every token; on the host, so the device has finished it."""
        self._calls += 1
        if self._calls == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """No more tokens."""


def _settings(arguments: argparse.Namespace, options: dict[str, Any]) -> list[Setting]:
    settings = [Setting(variant, ratio) for variant in arguments.variants for ratio in arguments.retain_ratios]
    for setting in settings:
        EarlyTomConfig.from_options({**options, **asdict(setting)})
    if len(set(settings)) < len(settings):
        raise EarlyTomConfigError("variants and retain_ratios name a setting twice.")
    return settings


def _introduction(questions: Sequence[Question], settings: Sequence[Setting], options: dict[str, Any], n: int) -> str:
    videos = len({question.path for question in questions})
    lowering = options.get("lowering", EarlyTomConfig.lowering)
    how = (
        "Nothing is compiled, full model included, which is the quickest way to an answer; --lowering staged measures "
        "times as compiled code has them"
        if lowering == "eager"
        else f"Full and compressed models are compiled (lowering={lowering!r}), which takes a while at first"
    )
    resumed = f" {n} of them were answered before." if n else ""
    return (
        f"{len(questions)} question(s) about {videos} video(s), each answered with all tokens and with "
        f"{', '.join(setting.name for setting in settings)}.{resumed} {how}."
    )


def _line(row: dict[str, Any], number: int, of: int) -> str:
    full = row["full"]
    shown = [f"full {_short(full['text'])}{_mark(full['right'])}"]
    for name, answer in row["settings"].items():
        text = "same" if answer["agrees"] else _short(answer["text"])
        shown.append(f"{name} {text}{_mark(answer['right'])} (lost {nats(answer['lost'], 2)})")
    return f"[{number}/{of}] {row['video']}: {row['question']} | " + " | ".join(shown)


def _mark(right: bool | None) -> str:
    return "" if right is None else " (right)" if right else " (wrong)"


def _short(text: str) -> str:
    return repr(text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 3] + "...") if text else "no answer"


def _about(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What rows must have in common to be compared."""
    names = ("model", "questions", "videos", "frames", "max_new_tokens", "dtype")
    return {**{name: getattr(arguments, name) for name in names}, "options": options}


def _resumed(arguments: argparse.Namespace, about: dict[str, Any], settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """The rows of a run that was stopped, which must have asked the same in the same way."""
    if not arguments.resume:
        return []
    if not arguments.json:
        raise EarlyTomConfigError("resume: give --json FILE too, the file that the stopped run has written.")
    if not Path(arguments.json).is_file():
        return []
    try:
        content = json.loads(Path(arguments.json).read_text(encoding="utf-8"))
        rows, before = content["rows"], content["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EarlyTomConfigError(f"resume: {arguments.json!r} is no file of earlytom compare ({error}).") from error
    now = json.loads(json.dumps({**about, "settings": [setting.name for setting in settings]}))
    for name, value in now.items():
        if before.get(name) != value:
            raise EarlyTomConfigError(
                f"resume: {arguments.json!r} was made with {name}={before.get(name)!r}, not {value!r}; give another "
                "--json, or leave out --resume to begin again."
            )
    return rows


def _save(
    path: str | None, about: dict[str, Any], rows: list[dict[str, Any]], settings: Sequence[Setting], *, finished: bool
) -> None:
    """All rows so far; the file is whole at any time."""
    if not path or (path == STANDARD_OUTPUT and not finished):
        return
    summaries = [summarize(rows, setting) for setting in settings] if rows else []
    best = recommended(summaries)
    content = {
        "finished": finished,
        "about": {**about, "settings": [setting.name for setting in settings]},
        "rows": rows,
        "summary": [
            {**asdict(one), "setting": one.setting.name, **asdict(one.setting), "kept": one.kept} for one in summaries
        ],
        "recommended": asdict(best.setting) if best else None,
        "recommendation": recommendation(summaries) if summaries else None,
    }
    write_text(path, json.dumps(content, indent=2) + "\n")
