"""What ``generate()`` and ``forward()`` of a model do once it is compiled in place (``in_place.py``).

    generate(input_ids [R, S], pixel_values_videos [V, F, 3, H, W], ...)
 -> rows = compiled_vision(video) for each video                  # one compilation for all numbers of frames
 -> input_ids, attention_mask cut to the rows that are left       # [R, S'], left-padded where rows differ
 -> the model's own generate(input_ids, inputs_embeds, ...)       # cache, beams, streamers agree by construction;
                                                                  # the prompt's pass through the language model
                                                                  # is compiled once for all lengths (prefill.py)
 -> the caller's own prompt ids, then the new tokens

Videos are encoded one at a time, so that a row's answer does not depend on its batch. What is special about a model is
asked of its family.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError, EarlyTomError
from ..families.base import Call, Family, Reason, Video
from ..families.base import Prompt as FamilyPrompt
from ..methods.base import Step
from ..prompt import Places, PromptCut, UncuttablePrompt, sizes_in_prompt, videos_of, without_waiting
from ..reporting import Counts, GraphRecord, Inside
from ..stages import fall_back
from .caches import cache_of, given_cache, mark_cache, refuse_compressed_cache
from .checks import (
    by_place,
    check_prompt,
    check_rows,
    continues,
    first_named_by,
    for_own_code,
    generation_of,
    is_encoded,
    reason_against_forward,
    reason_against_generate,
    reason_against_prompt,
    refuse_mixture,
    require_tensors,
    takes,
)
from .generating import each_step, generating, within_generate
from .generation import (
    inferred_mask,
    named_arguments,
    option,
    reason_against,
    shorten_limits,
    show_own_prompt,
    warn_of_right_padding,
    with_own_prompt,
)
from .inner_steps import InnerPrompt
from .method import Method
from .placement import weights_in_place
from .prefill import CompiledPrefill, Prompt
from .ready_prompts import hand_over, handed_to
from .shorter_caches import refuse_other_cache
from .video_encoder import EncodedVideo, VideoEncoder

log = logging.getLogger(__name__)
_MASK = "attention_mask"
_NO_VIDEO = "no video"


class CompiledModel:
    """What ``compile()`` adds to a model: its options, its compiled vision paths, and the last call's numbers."""

    def __init__(self, model: torch.nn.Module, config: EarlyTomConfig, family: Family) -> None:
        self.model: Any = model
        self.config = config
        self.family = family
        self.generation = generation_of(model, family)
        self.methods = {"forward": "forward"}  # of the model -> what stands in for it here
        if self.generation != "forward":
            self.methods["generate"] = "generate"
        if family.prompt_method is not None:
            self.methods[family.prompt_method] = "prompt_method"
        self.own = {name: getattr(model, name) for name in self.methods}
        self.replaced = {name: model.__dict__[name] for name in self.own if name in model.__dict__}
        self.prompt: tuple[int, int] | None = None
        self.inside: Inside = ()
        self.videos: list[tuple[GraphRecord, Counts]] = []
        self.last_call: str | None = None  # what became of it, in the words of reporting.Report.last_call
        self.compressed = False  # whether any call was
        self.record = GraphRecord("", False)
        self.encoder = VideoEncoder(model, config, family, self.record)
        self.prefill: CompiledPrefill | None = None
        self._encoded_before = WeakIdKeyDictionary()  # rows that encode_videos() returned -> EncodedVideo, without them

    def is_in_place(self) -> bool:
        """Whether nobody has put something else over the methods of the model since."""
        return all(isinstance(self.model.__dict__.get(name), Method) for name in self.own)

    def take_over(self, before: "CompiledModel") -> None:
        """Use what was compiled with other options and does not depend on them."""
        self.encoder.take_over(before.encoder)
        self._encoded_before = before._encoded_before  # where its rows stand was decided when they were encoded
        same = ("compile_llm", "lowering", "mode")
        inside = self.config.reduces_inside() or before.config.reduces_inside()
        if not inside and all(getattr(self.config, name) == getattr(before.config, name) for name in same):
            self.prefill = before.prefill

    def install_prefill(self, steps: Sequence[Step]) -> None:
        """Compile the language model's pass over prompts too, or let tokens go in it, where the options say so."""
        lowering = self.config.lowering if self.config.compile_llm else "eager"
        if self.prefill is None and (steps or lowering != "eager"):
            language_model = self.family.language_model(self.model)
            if language_model is not None:
                self.prefill = CompiledPrefill(
                    language_model,
                    lowering,
                    self.config.mode,
                    without=self.family.vision_within(self.model),
                    steps=steps,
                    fall_back=self._fall_back_inside,
                )
        if self.prefill is not None:
            self.prefill.install()

    def _fall_back_inside(self, reason: str, cure: str) -> None:
        try:
            fall_back(reason, cure, self.config, self.record)
        except EarlyTomError:
            self._note("failed")
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        twin = memo[id(self)] = type(self).__new__(type(self))
        called: dict[str, Any] = {"videos": [], "inside": (), "prompt": None, "last_call": None, "compressed": False}
        called["_encoded_before"] = WeakIdKeyDictionary()
        state = {**self.__dict__, **called}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EarlyTomError(
            "a model compiled by earlytom_compile.compile() cannot be pickled, since compiled code cannot: call "
            "earlytom_compile.restore(model), save it, and compile it again where it is loaded."
        )

    def records(self) -> list[GraphRecord]:
        """Those of all graphs that compress videos."""
        return self.encoder.records()

    @property
    def notes(self) -> list[str]:
        """Reasons why a call ran uncompressed."""
        return self.record.reasons

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with compressed videos; see ``compile()``."""
        call = self.family.by_our_names(named_arguments(self.model, args, kwargs))
        name = self._name_of_ids()
        ids: Any = call[name] if call.get(name) is not None else call.get("input_ids")
        reason = self._reason_to_leave_alone(ids, call)
        cut = None if reason else self._compress(ids, call)
        if cut is None:

            def inside() -> AbstractContextManager[None]:
                return generating(left_a_video=reason != _NO_VIDEO)

            with inside():
                output = self._uncut("generate", args, kwargs, call, reason)
            return each_step(output, inside)
        arguments = dict(cut.arguments)
        if cut.input_ids is not None:
            arguments[name] = cut.input_ids
            if name != "input_ids":
                arguments.pop("input_ids", None)
        if self.generation == "transformers":
            shorten_limits(self.model, arguments, dropped=cut.dropped)
            if cut.input_ids is not None:
                show_own_prompt(arguments, ids, cut.input_ids.shape[1])

        @contextmanager
        def around() -> Iterator[None]:
            with generating(left_a_video=False), self._handed_over(cut):
                yield

        with around():
            output = self._own("generate", **arguments)
            cut.has_begun = not inspect.isgenerator(output)
        mark_cache(cache_of(output), given_cache(call))
        if cut.input_ids is not None:
            output = with_own_prompt(output, ids, cut.input_ids)
        return each_step(output, around)

    def _name_of_ids(self) -> str:
        """What ``generate()`` calls the ids, if by our names: that of the family, or else its first, as ``inputs``."""
        kind, spelled = type(self.model), self.family.spelled
        if spelled("input_ids") in first_named_by(kind, "generate"):
            return "input_ids"
        return next(
            (name for name in by_place(kind, "generate") if name != spelled("pixel_values_videos")), "input_ids"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model.forward`` with compressed videos: logits have the cut length."""
        if args:
            names = list(inspect.signature(self.own["forward"]).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        call: dict[str, Any] = self.family.by_our_names(kwargs)
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true while any other thread compiles
            if call.get("pixel_values_videos") is None and not self.family.encoded_before(call):
                return self.own["forward"](**kwargs)  # transformers compiles decoding steps: it sees the model alone
            # Behind a graph break: traced by another torch.compile, our own would do nothing.
            return torch.compiler.disable(self.forward)(**kwargs)
        refuse_other_cache(given_cache(call), () if self.prefill is None else self.prefill.steps)
        if within_generate():  # transformers 5.17 encodes the video here
            return self.own["forward"](**kwargs)
        ids: Any = call.get("input_ids")
        reason = self._reason_to_leave_alone(ids, call, forward=True)
        cut = None if reason else self._compress(ids, call, forward=True)
        if cut is None:
            return self._uncut("forward", (), kwargs, call, reason)
        with self._handed_over(cut):
            return self._own("forward", **cut.arguments)

    def prompt_method(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method that puts rows into its prompt (:attr:`Family.prompt_method`); in a call that we have
        compressed it has done so already."""
        assert self.family.prompt_method is not None
        own, handed = self.own[self.family.prompt_method], handed_to(self)
        if handed is not None:
            ready = handed.take()
            return own(*args, **kwargs) if ready is None else ready.returned
        call = self.family.by_our_names(inspect.signature(own).bind(*args, **kwargs).arguments)
        if call.get("pixel_values_videos") is None:
            return own(*args, **kwargs)
        # Called by hand, or by a generate() that brings its videos in a way of its own.
        ids: Any = call.get("input_ids")
        reason = self._reason_to_leave_alone(ids, call, forward=True)
        cut = None if reason else self._compress(ids, call, forward=True)
        return own(*args, **kwargs) if cut is None or cut.prompt is None else cut.prompt.returned

    def _own(self, method: str, **call: Any) -> Any:
        """The model's own method, with arguments as it calls them."""
        return self.own[method](**self.family.by_its_own_names(call))

    def _uncut(self, method: str, args: tuple[Any, ...], kwargs: Call, call: Call, reason: str | None) -> Any:
        """The model's own method for a call that is left alone: as it came, unless the model cannot take that."""
        as_it_came = self._is_closed(method) or self.family.prompt_method is not None  # such a method takes lists
        changed = call if as_it_came else for_own_code(call, reason or self.notes[-1])
        with nullcontext() if reason == _NO_VIDEO else hand_over(self, None):
            return self.own[method](*args, **kwargs) if changed is call else self._own(method, **changed)

    def _is_closed(self, method: str) -> bool:
        """Whether this is a call of, or in, a ``generate()`` that compressed videos cannot reach."""
        return self.generation is None and (method == "generate" or within_generate() is not None)

    @contextmanager
    def _handed_over(self, cut: "_CutCall") -> Iterator[None]:
        """Around the model's own method that gets the cut call."""
        prefill = nullcontext() if self.prefill is None else self.prefill.active(cut.mask, cut.inner)
        with hand_over(self, cut.prompt) as handed, prefill as prompt:
            yield
            if not cut.has_begun:  # a generator, which takes its prompt in one of its steps
                cut.has_begun = True
                return
            if prompt is not None:
                self._note_inside(cut, prompt)
                cut.inner = prompt.inner
            cut.prompt = handed.prompt
        if handed.prompt is not None:
            self._note("uncompressed")
            fall_back(
                f"{self.family.prompt_method}() of the model is not what it was, and was called with the video",
                "Call earlytom_compile.compile(model) again, after whatever replaces it",
                self.config,
                self.record,
            )

    def _note_inside(self, cut: "_CutCall", prompt: Prompt) -> None:
        """What was left of the prompt inside the language model."""
        if prompt.inner is not None:
            self._fall_back_inside(
                "no tokens go inside the language model: it was not called with the prompt as one piece",
                "Call generate() or forward() of the model itself",
            )
        if prompt.kept:
            assert self.prefill is not None
            layers = [step.layer for step in self.prefill.steps]
            self.inside = [(layer, kept.shape[1]) for layer, kept in zip(layers, prompt.kept, strict=True)]

    def _reason_to_leave_alone(self, ids: Any, call: Call, forward: bool = False) -> str | None:
        """Why the call runs uncompressed, said in a warning unless it simply has no video."""
        family, videos = self.family, call.get("pixel_values_videos")
        closed = self._is_closed("forward" if forward else "generate")
        if not closed:
            require_tensors(family, videos)  # else it may take paths, or what it likes
        if videos is None or (isinstance(videos, Sized) and len(videos) == 0):
            refuse_compressed_cache(given_cache(call), ids, family.video_token(self.model))
            if within_generate() is not None:
                return _NO_VIDEO
            if family.encoded_before(call):
                self._note("failed")
                fall_back(
                    "the video is given as features (mm_encoder_outputs), which reach the language model as they are",
                    f"Pass {family.spelled('pixel_values_videos')} to have it compressed",
                    self.config,
                    self.record,
                )
                self._note("uncompressed")
            elif not continues(call):  # else it is one of many steps of a call
                self._note(_NO_VIDEO)
            return _NO_VIDEO
        if family.refused_by_model(call, forward=forward):
            return "the model's own code refuses the call, with an error of its own"
        if not self.compressed:
            log.info("the first call with a video: tracing the model, which compiles before it answers ...")
        self._note("failed")  # unless nothing else is noted
        reason = reason_against_generate(self.model, family) if closed else reason_against_prompt(family, ids, call)
        reason = reason or self.encoder.reason_against_placement()
        if reason is None and forward:
            reason = reason_against_forward(self.model, call)
        elif reason is None and self.generation == "transformers":
            reason = reason_against(self.model, call)
        if reason is None:
            reason = family.reason_against(self.model, call) or self._reason_against_replaced()
        if reason is None:
            return None
        if is_encoded(videos):
            raise EarlyTomConfigError(f"encoded videos cannot be used: {reason[0]}. {reason[1]}.")
        fall_back(*reason, self.config, self.record)
        self._note("uncompressed")
        return reason[0]

    def _reason_against_replaced(self) -> Reason | None:
        """(reason, cure) where the prompt is made by code that would be left out."""
        if self.family.prompt_method not in self.replaced:
            return None
        return (
            f"{self.family.prompt_method}() of this model was replaced by another before compile(), which cannot be "
            "given compressed videos",
            "Take it off the model and compile again; that of a subclass is used",
        )

    def _checked_videos(self, ids: torch.Tensor, call: Call) -> Sequence[Video | torch.Tensor]:
        """Those of the call: pixels, or rows [K, C] that were encoded before. Raises where something cannot fit."""
        check_prompt(self.family, ids, call.get("attention_mask"))
        given = call["pixel_values_videos"]
        refuse_mixture(self.family, given)
        if not is_encoded(given):
            return self.family.videos(self.model, call)
        check_rows(given, self.family.row_width(self.model))
        return list(given)

    def _note(
        self, last_call: str, videos: Sequence[tuple[GraphRecord, Counts]] = (), prompt: tuple[int, int] | None = None
    ) -> None:
        """What the report says of this call."""
        self.last_call, self.videos, self.prompt, self.inside = last_call, list(videos), prompt, ()
        self.compressed = self.compressed or bool(videos)

    @torch.no_grad()
    def _compress(self, ids: torch.Tensor, call: Call, forward: bool = False) -> "_CutCall | None":
        """The call with embeddings in place of pixels, or None to leave it alone."""
        videos = self._checked_videos(ids, call)
        if self.family.prompt_method is not None:
            return self._put_into_prompt(ids, call, videos)
        # All that the host has to know of the prompt is read before the encoder is launched: a read after it would
        # wait until the encoder is done, and the device for the host to launch what follows.
        given = call.get("attention_mask")
        host_ids, mask = ids.cpu(), None if given is None else given.cpu()
        if not forward and self.generation == "transformers":
            warn_of_right_padding(self.model, host_ids, mask, call)
            mask = inferred_mask(self.model, host_ids, call) if mask is None else mask
        with weights_in_place(self.model, self.family):
            others = list(self.family.other_rows(self.model, ids, call))
        encoded = self._encoded(videos)
        rows = [video.rows for video in encoded]
        try:
            places = self._places(host_ids, self._sizes(videos, encoded, host_ids))
            # What forward() returns has a column for each position, the padded ones too. Images have as many rows.
            wanted = None if forward or mask is None else mask.bool()
            if wanted is not None:
                wanted = functools.reduce(torch.logical_or, (host_ids == token for token, _ in others), wanted)
            stay = [video.places() for video in encoded] if self.family.keeps_places else list(map(len, rows))
            plan = PromptCut.plan(host_ids, places, stay, wanted)
            if plan.padded and not takes(self.own["forward" if forward else "generate"], self.family.spelled(_MASK)):
                raise UncuttablePrompt(
                    "the rows keep different numbers of tokens, and the model takes no attention mask",
                    "Give each row in a call of its own",
                )
        except UncuttablePrompt as reason:
            fall_back(str(reason), reason.cure, self.config, self.record)
            self._note("uncompressed")
            return None
        if mask is None and plan.padded:
            mask = torch.ones_like(host_ids)
        cut_mask = None if mask is None else plan.take(mask, 0)
        new_ids = without_waiting(plan.take(host_ids, self._padding_id()), ids.device)
        self._note_videos(videos, encoded, (ids.shape[1], new_ids.shape[1]))
        video_rows = self.family.video_token(self.model), torch.cat(rows)
        changed = self.family.inputs(self.model, new_ids, [*others, video_rows])
        if cut_mask is not None and not (given is None and bool(cut_mask.all())):
            # Of a batch without a mask where none can be inferred, transformers says what it thinks itself.
            changed[_MASK] = without_waiting(cut_mask, ids.device)
        effective = {**call, "input_ids": ids}  # which generate() also takes as its first argument
        if mask is not None:
            effective["attention_mask"] = without_waiting(mask, ids.device)
        if (positions := self.family.position_ids(self.model, effective, plan)) is not None:
            changed["position_ids"] = positions
        if call.get("labels") is not None:
            changed["labels"] = plan.take(call["labels"], -100)
        gone = self.family.consumed | {"input_ids", "pixel_values_videos"}
        kept = {name: value for name, value in call.items() if name not in gone}
        token, kept_rows = self.family.video_token(self.model), list(map(len, rows))
        inner = self._inner_steps(lambda: videos_of(plan.take(host_ids, -1), token, kept_rows), cut_mask, call)
        return _CutCall({**kept, **changed}, cut_mask, ids.shape[1] - new_ids.shape[1], new_ids, inner=inner)

    def _inner_steps(
        self, find: Callable[[], torch.Tensor], mask: torch.Tensor | None, call: Call
    ) -> InnerPrompt | None:
        """The steps of a prompt in which :func:`find` says where the videos are; None where none of their tokens go."""
        if self.prefill is None or not self.prefill.steps:
            return None
        if call.get("labels") is not None:
            self._fall_back_inside(
                "no tokens go inside the language model: each of its labels belongs to a position of the whole prompt",
                "Leave labels out, and compute the loss from the logits",
            )
            return None
        try:
            videos = find()
        except NotImplementedError:
            self._fall_back_inside(
                f"no tokens go inside the language model: the family {self.family.name} does not say where videos are "
                "in its prompts",
                "Give it the method prompt_videos, as docs/adding-a-model.md says",
            )
            return None
        return InnerPrompt.plan(videos, None if mask is None else mask.cpu(), self.prefill.steps)

    def _put_into_prompt(self, ids: torch.Tensor, call: Call, videos: Sequence[Video | torch.Tensor]) -> "_CutCall":
        """The call as it came, and the prompt that the model's own method makes of the compressed rows."""
        family, encoded = self.family, self._encoded(videos)
        with weights_in_place(self.model, family):
            others = list(family.other_rows(self.model, ids, call))
            prompt = family.prompt(self.model, ids, call, [video.rows for video in encoded], others)
            length, sizes, kept = prompt.length, [video.size for video in encoded], [len(v.rows) for v in encoded]
            if any(video.size != len(video.rows) for video in encoded):  # else they came encoded, or kept all
                length = family.prompt_length(self.model, ids, call, sizes, others)
            inner = self._inner_steps(
                lambda: family.prompt_videos(self.model, ids, call, kept, others), prompt.mask, call
            )
        self._note_videos(videos, encoded, (length, prompt.length))
        mask = torch.ones(1, 1) if prompt.mask is None else prompt.mask
        return _CutCall(dict(call), mask, length - prompt.length, prompt=prompt, inner=inner)

    @torch.no_grad()
    def encode_videos(self, videos: Sequence[Video]) -> list[torch.Tensor]:
        """See ``earlytom_compile.encode_videos``."""
        self._note("failed")
        encoded = self._encoded(videos)
        self._note("encoded", [video.counts for video in encoded if video.counts is not None])
        for video in encoded if self.family.keeps_places else ():
            self._encoded_before[video.rows] = video.size, video.places()
        return [video.rows for video in encoded]

    def _encoded(self, videos: Sequence[Video | torch.Tensor]) -> list[EncodedVideo]:
        """Each by itself; rows that were encoded before as they are."""
        return [self.encoder.encode(video) if isinstance(video, Video) else self._known(video) for video in videos]

    def _known(self, rows: torch.Tensor) -> EncodedVideo:
        """A video that :meth:`encode_videos` has encoded."""
        if not self.family.keeps_places:
            return EncodedVideo(rows, len(rows), None)
        if rows not in self._encoded_before:
            raise EarlyTomConfigError(
                f"an encoded video of shape {tuple(rows.shape)} is not one that earlytom_compile.encode_videos(model, "
                f"...) returned: {self.family.name} knows by the position of a token where and when it is, which a "
                "copy of the rows does not say. Give the tensors themselves, to the same model."
            )
        size, places = self._encoded_before[rows]
        return EncodedVideo(rows, size, None, places)

    def _note_videos(
        self, videos: Sequence[Video | torch.Tensor], encoded: Sequence[EncodedVideo], prompt: tuple[int, int]
    ) -> None:
        counts = [video.counts for video in encoded if video.counts is not None]
        if isinstance(videos[0], torch.Tensor):
            self._note("given")
        else:
            self._note("compressed" if counts else "uncompressed", counts, prompt)

    def _sizes(
        self, videos: Sequence[Video | torch.Tensor], encoded: Sequence[EncodedVideo], ids: torch.Tensor
    ) -> list[int]:
        """How many placeholders each video has in ``ids``."""
        if isinstance(videos[0], torch.Tensor) and not self.family.keeps_places:
            return sizes_in_prompt(ids, self.family.video_token(self.model), len(videos))
        return [video.size for video in encoded]

    def _places(self, ids: torch.Tensor, sizes: Sequence[int]) -> Places:
        """Those of the family, with whose author a number that does not fit begins."""
        try:
            return self.family.places(self.model, ids, sizes)
        except EarlyTomConfigError as error:
            if type(self.family).__module__.startswith("earlytom_compile."):
                raise
            raise EarlyTomConfigError(
                f"{error} If it was, rows() or video_token() of the family {self.family.name} is wrong: a placeholder "
                "belongs to each row."
            ) from error

    def _padding_id(self) -> int:
        padding = option(self.model, {}, "pad_token_id")
        return padding if isinstance(padding, int) and padding != self.family.video_token(self.model) else 0


@dataclass
class _CutCall:
    """A call whose videos are compressed."""

    arguments: dict[str, Any]
    mask: torch.Tensor | None  # [R, S'], of the cut prompt; None if not known
    dropped: int  # S - S'
    input_ids: torch.Tensor | None = None  # int64 [R, S'], on the device of the caller's; None leaves its own
    prompt: FamilyPrompt | None = None  # what the model's own method returns in this call; None once it has
    inner: InnerPrompt | None = None  # where its videos are, if tokens of theirs go inside; None once they have
    has_begun: bool = True  # False for a generator that nobody has asked for anything
