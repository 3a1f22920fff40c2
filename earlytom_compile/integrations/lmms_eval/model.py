"""The models themselves, as lmms-eval calls them; one class does the work, the others say what they take.

    EarlyTom(pretrained="path/or/hub-id", retain_ratio=0.2).generate_until(requests)  -> answers, in their order

An error in a sample ends the evaluation, with the sample in the message. lmms-eval itself would go on and count an
empty answer where a model hides it, and its command line prints any other exception and ends with exit code 0: so a
model that was made by name, as the command line does, leaves by ``SystemExit``, which it lets through.
"""

import itertools
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import StoppingCriteriaList

import earlytom_compile

from ...errors import EarlyTomConfigError, EarlyTomError, EarlyTomFallbackWarning, EarlyTomVideoWarning
from ...reused import patches_of
from ...words import counted, what_ended
from ..checkpoint_files import read_json
from .arguments import Arguments, read_arguments, read_options, require_once
from .costs import Costs, Shown, Spent
from .generation import Decoding, FirstToken, StopTexts, batches, read_decoding
from .llava_code import ARGUMENTS, LlavaSpeaker
from .loading import load_speaker
from .prompts import Turn, from_messages, from_visuals
from .speaker import Sample, Speaker, require_whole

log = logging.getLogger(__name__)

_NUMBERS = 20  # of documents in a message


class SampleError(EarlyTomError):
    """A sample could not be answered; the message says which, and why."""


class EarlyTom(lmms):
    """Any checkpoint that the command line can load, compressed or not; for simple tasks.

    ``arguments`` are those of :func:`.arguments.read_arguments`: ``pretrained``, ``retain_ratio`` (0.2; "full" or None
    for the model as it is), the other options of ``compile()`` by their names, ``device``, ``dtype``,
    ``max_frames_num``, ``batch_size``. Raises :class:`EarlyTomConfigError` for any other, and for a checkpoint that
    cannot be loaded.
    """

    is_simple = True
    model_type: str | None = None
    """The only ``model_type`` in config.json that is taken; None takes every one that is known."""
    own_arguments: tuple[str, ...] = ()
    _around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        # lmms-eval gives each process its share of the samples by the same variables, which accelerate sets.
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        read = read_arguments(arguments, self.own_arguments)
        if self._world_size > 1 and read.device == "auto" and torch.cuda.is_available():
            arguments["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            read = read_arguments(arguments, self.own_arguments)
        self.batch_size = read.batch_size
        self._speaker = self._load(read)
        self._set(read.retain_ratio, read.options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "EarlyTom":
        """As lmms-eval makes a model by its name. Errors, in making it and later, end the process with exit code 1."""
        with _leaving():
            require_once(simple_parse_args_string(arg_string), additional_config or {})
            made: EarlyTom = super().create_from_arg_string(arg_string, additional_config)
        made._around = _leaving
        return made

    @property
    def model(self) -> Any:
        """The model of transformers (or of LLaVA's own code) that answers."""
        return self._speaker.model

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device

    def use(self, retain_ratio: float | None, **options: Any) -> None:
        """Compress so from now on, and count costs anew; None is the full model, restored exactly.

        ``options`` are those of ``compile()``, all of them: what was in force before is not kept. ``strict`` is True
        unless it is given. Raises :class:`EarlyTomConfigError` for bad ones.
        """
        self._set(*read_options({"retain_ratio": retain_ratio, **options}))

    def costs(self) -> dict[str, float]:
        """What was asked since :meth:`use`, or since the beginning: see :meth:`.costs.Costs.means`."""
        return self._costs.means()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of ``requests``; raises :class:`SampleError`, or leaves where it was made by name.

        What they cost goes into lmms-eval's results as ``throughput``: ``avg_ttft_ms`` and so on, as :meth:`costs`.
        """
        with self._around():
            return self._answered(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: see the message."""
        with self._around():
            raise self._not_there("loglikelihood", "those whose output_type is generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: see the message."""
        with self._around():
            raise self._not_there("generate_until_multi_round", "those of one round")

    # --- What differs between kinds -------------------------------------------------------------------

    def _load(self, arguments: Arguments) -> Speaker:
        if self.model_type is not None:
            found = read_json(arguments.pretrained, "config.json").get("model_type")
            if found != self.model_type:
                raise EarlyTomConfigError(
                    f"{arguments.pretrained!r} is a checkpoint of model_type {found!r}, and this model takes "
                    f"{self.model_type!r} only: take --model earlytom, or another checkpoint."
                )
        return load_speaker(arguments)

    def _given(self, request: Instance) -> dict[str, Any]:
        """The generation arguments of a request."""
        return request.args[1]

    def _turns(self, request: Instance) -> list[Turn]:
        """The prompt of a request."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        return from_visuals(context, doc_to_visual(self.task_dict[task][split][doc_id]), request.metadata)

    # --- Answering ------------------------------------------------------------------------------------

    def _set(self, retain_ratio: float | None, options: dict[str, Any]) -> None:
        if retain_ratio is None:
            earlytom_compile.restore(self.model)
        else:
            earlytom_compile.compile(self.model, retain_ratio=retain_ratio, **options)
        self._costs = Costs(retain_ratio)
        self._warm: set[bool] = set()  # of calls without and with videos, whether there was one

    def _answered(self, requests: list[Instance]) -> list[GenerationResult]:
        asked, spent = Costs(self._costs.retain_ratio), Spent()
        answers: dict[int, GenerationResult] = {}
        bare: list[Instance] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answering") as bar:
            for places in batches([self._given(request) for request in requests], self.batch_size):
                chunk = [requests[place] for place in places]
                answers.update(zip(places, self._answer(chunk, asked, spent, bare), strict=True))
                bar.update(len(places))
        _warn_of_bare(bare, requests)
        self._costs.take_in(asked)
        if requests:
            speed = spent.tokens / spent.seconds if spent.seconds else 0.0
            log_metrics(spent.seconds, spent.tokens, speed, additional_metrics=asked.means())
        return [answers[place] for place in range(len(requests))]

    def _answer(
        self, requests: Sequence[Instance], asked: Costs, spent: Spent, bare: list[Instance]
    ) -> list[GenerationResult]:
        """A batch with the same generation arguments; those of its requests that show nothing are added to ``bare``."""
        samples = [self._sample(request) for request in requests]
        bare += [request for request, sample in zip(requests, samples, strict=True) if not any(sample.kind)]
        answers: dict[int, GenerationResult] = {}
        for places in self._calls(samples):
            chunk = [requests[place] for place in places]
            with _named(chunk):
                decoding = read_decoding(self._given(chunk[0]))
                new = self._generate([samples[place] for place in places], decoding, asked, spent)
            answers.update(zip(places, new, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _sample(self, request: Instance) -> Sample:
        with _named([request]):
            sample = self._speaker.prepare(self._turns(request))
            if self._costs.retain_ratio is None or not sample.videos:
                self._require_all_of_it(sample)
            return sample

    def _require_all_of_it(self, sample: Sample) -> None:
        if any(sample.kind):  # nobody cuts words alone
            require_whole(self._speaker.positions(sample), self._speaker.longest_prompt, compressed=False)

    def _require_all_compressed(self, samples: Sequence[Sample]) -> None:
        """Of the last call: how long its prompts become is known once they are compressed."""
        if self._costs.retain_ratio is None or self._speaker.longest_prompt is None or not samples[0].videos:
            return
        report = earlytom_compile.report(self.model).to_dict()
        if report["last_call"] == "compressed":
            require_whole(report["prompt"][1], self._speaker.longest_prompt, compressed=True)
        else:  # without strict, a call may keep all tokens
            for sample in samples:
                self._require_all_of_it(sample)

    def _calls(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Places of the samples that can go into one call."""
        alike: dict[Any, list[int]] = {}
        for place, sample in enumerate(samples):
            lengths = () if self._any_lengths() else tuple(sorted(set(sample.frames)))
            alike.setdefault((sample.kind, lengths), []).append(place)
        return list(alike.values())

    def _any_lengths(self) -> bool:
        return self._costs.retain_ratio is not None or self._speaker.mixes_lengths

    def _generate(
        self, samples: Sequence[Sample], decoding: Decoding, asked: Costs, spent: Spent
    ) -> list[GenerationResult]:
        if not self._any_lengths():
            _require_one_length(samples[0])
        inputs = self._speaker.inputs(samples)
        graphs = self._graphs()
        output, first, seconds = self._timed(inputs, decoding)
        self._require_all_compressed(samples)
        new = [_ended(row, self._ends()) for row in self._speaker.new_tokens(output, inputs).tolist()]
        shown = self._shown(samples)
        if bool(shown) not in self._warm or self._graphs() != graphs:
            # What it compiled costs the first question of a kind and no other: timed once more, answered already.
            _, first, seconds = self._timed(inputs, decoding)
            self._warm.add(bool(shown))
        asked.add(first, len(samples), shown)
        spent.add(seconds, sum(map(len, new)))
        return [GenerationResult(decoding.cut(self._text(row)), TokenCounts(output_tokens=len(row))) for row in new]

    def _timed(self, inputs: dict[str, Any], decoding: Decoding) -> tuple[torch.Tensor, float, float]:
        """What ``generate()`` returns, seconds to the first token, and to the last."""
        first = FirstToken(self.device)
        stops = [StopTexts(decoding.until, self._texts)] if decoding.until else []
        padding = self._speaker.tokenizer.pad_token_id
        output = self.model.generate(
            **inputs,
            **decoding.arguments,
            stopping_criteria=StoppingCriteriaList([first, *stops]),
            pad_token_id=next(iter(self._ends()), 0) if padding is None else padding,
        )
        seconds = first.total()
        return output, seconds if first.seconds is None else first.seconds, seconds

    def _graphs(self) -> int:
        if self._costs.retain_ratio is None:
            return 0
        return earlytom_compile.report(self.model).to_dict()["graphs"]

    def _shown(self, samples: Sequence[Sample]) -> list[Shown]:
        """Frames and tokens of each question with videos, as the last call left them."""
        asked = [sample for sample in samples if sample.videos]
        sizes = [(sum(sample.frames), self._speaker.video_tokens(sample)) for sample in asked]
        full = [Shown(frames, frames, tokens, tokens) for frames, tokens in sizes]
        if self._costs.retain_ratio is None or not asked:
            return full
        report = earlytom_compile.report(self.model).to_dict()
        if report["last_call"] != "compressed":  # without strict, a call may keep all tokens
            return full
        left, shown = iter(report["videos"]), []
        for sample, (frames, tokens) in zip(asked, sizes, strict=True):
            of_these = list(itertools.islice(left, len(sample.videos)))
            merged = sum(video["frames"][-1] for video in of_these)
            kept = sum(video["tokens"][1] for video in of_these)
            patches = patches_of({"videos": of_these})
            encoded = sum(each.total / each.places for each in patches) if patches else None
            shown.append(Shown(frames, merged, tokens, kept, encoded))
        return shown

    def _ends(self) -> tuple[int, ...]:
        ends = self.model.generation_config.eos_token_id
        return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)

    def _text(self, tokens: list[int]) -> str:
        return self._texts([tokens])[0]

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return self._speaker.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _not_there(self, what: str, instead: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {what}: take tasks that need none, {instead}.")


class EarlyTomChat(EarlyTom):
    """The same for chat tasks."""

    is_simple = False

    def _given(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _turns(self, request: Instance) -> list[Turn]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return from_messages(doc_to_messages(self.task_dict[task][split][doc_id]))


class EarlyTomLlavaOnevisionHf(EarlyTom):
    """transformers' LLaVA-OneVision, for simple tasks."""

    model_type = "llava_onevision"


class EarlyTomLlavaOnevisionHfChat(EarlyTomChat):
    """transformers' LLaVA-OneVision, for chat tasks."""

    model_type = "llava_onevision"


class EarlyTomLlavaOnevision(EarlyTom):
    """LLaVA's own models, for simple tasks."""

    own_arguments = ARGUMENTS

    def _load(self, arguments: Arguments) -> Speaker:
        return LlavaSpeaker(arguments)


class EarlyTomLlavaOnevisionChat(EarlyTomChat, EarlyTomLlavaOnevision):
    """LLaVA's own models, for chat tasks."""


@contextmanager
def _leaving() -> Iterator[None]:
    """Errors end the process with their message and exit code 1, and a traceback where they are none of ours."""
    try:
        yield
    except Exception as error:
        if not isinstance(error.__cause__ or error, EarlyTomError):
            traceback.print_exception(error)
        raise SystemExit(f"error: {error}") from error


def _require_one_length(sample: Sample) -> None:
    if len(set(sample.frames)) > 1:
        raise EarlyTomConfigError(
            f"the full model takes videos of one length in a prompt, and these have {sample.frames} frames: give "
            f"max_frames_num={min(sample.frames)}, or fewer."
        )


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the token that ends the answer, behind which there is padding."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


def _documents(requests: Sequence[Instance]) -> str:
    """``"task a, document 3, 4; task b, document 0"``, as many of each task as one reads."""
    documents: dict[str, list[str]] = {}
    for request in requests:
        documents.setdefault(request.task_name, []).append(str(request.doc_id))
    return "; ".join(f"task {task}, document {_first(numbers)}" for task, numbers in documents.items())


def _first(numbers: Sequence[str]) -> str:
    more = f" and {len(numbers) - _NUMBERS} more" if len(numbers) > _NUMBERS else ""
    return ", ".join(numbers[:_NUMBERS]) + more


def _warn_of_bare(bare: Sequence[Instance], requests: Sequence[Instance]) -> None:
    """Once for a round; of one that shows nothing at all, that is what it is."""
    if 0 < len(bare) < len(requests):
        log.warning(
            "%s: no picture and no video with %s of %d, which count like the others: look at what the task shows",
            _documents(bare),
            counted(len(bare), "question"),
            len(requests),
        )


@contextmanager
def _named(requests: Sequence[Instance]) -> Iterator[None]:
    """Errors and warnings that say which samples they come from; lmms-eval's own modules silence warnings."""
    which = _documents(requests)
    with warnings.catch_warnings(record=True) as caught:
        for kind in (EarlyTomVideoWarning, EarlyTomFallbackWarning):
            warnings.simplefilter("always", kind)
        try:
            yield
        except SystemExit as exit:  # as tasks do where a file is missing
            raise SampleError(f"{which}: {what_ended(exit)}") from exit
        except Exception as error:
            name = "" if isinstance(error, EarlyTomError) else f"{type(error).__name__}: "
            raise SampleError(f"{which}: {name}{error}") from error
    for warning in caught:
        log.warning("%s: %s", which, warning.message)
