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
from collections.abc import Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError, EarlyTomError
from ..families.base import Call, Family, Video
from ..prompt import Places, PromptCut, UncuttablePrompt, sizes_in_prompt, without_waiting
from ..reporting import Counts, GraphRecord
from ..stages import Kinds, asks_for_cuda_graphs, fall_back
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
from .method import Method
from .placement import MOST_SETS_OF_HOOKS, Placement, weights_in_place
from .prefill import CompiledPrefill
from .vision_path import VisionPath, describe, kind_of

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
        methods = ("forward",) if self.generation == "forward" else ("forward", "generate")
        self.own = {name: getattr(model, name) for name in methods}
        self.replaced = {name: model.__dict__[name] for name in self.own if name in model.__dict__}
        self.prompt: tuple[int, int] | None = None
        self.videos: list[tuple[GraphRecord, Counts]] = []
        self.last_call: str | None = None  # what became of it, in the words of reporting.Report.last_call
        self.compressed = False  # whether any call was
        self.record = GraphRecord("", False)
        self._paths: dict[Any, VisionPath] = {}
        # A CUDA graph replays fixed sizes, and none is captured behind a size that is not known.
        self.any_length = not asks_for_cuda_graphs(config.mode)
        self._kinds: Kinds = {}
        self.prefill: CompiledPrefill | None = None

    def is_in_place(self) -> bool:
        """Whether nobody has put something else over the methods of the model since."""
        return all(isinstance(self.model.__dict__.get(name), Method) for name in self.own)

    def take_over(self, before: "CompiledModel") -> None:
        """Use what was compiled with other options and does not depend on them."""
        self._kinds = before._kinds
        same = ("compile_llm", "lowering", "mode")
        if all(getattr(self.config, name) == getattr(before.config, name) for name in same):
            self.prefill = before.prefill

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        # A copy of the model compiles for itself: compiled code belongs to the weights it was traced with.
        twin = memo[id(self)] = type(self).__new__(type(self))
        compiled: dict[str, Any] = {"_paths": {}, "_kinds": {}}
        called: dict[str, Any] = {"videos": [], "prompt": None, "last_call": None, "compressed": False}
        state = {**self.__dict__, **compiled, **called}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EarlyTomError(
            "a model compiled by earlytom_compile.compile() cannot be pickled, since compiled code cannot: call "
            "earlytom_compile.restore(model), save it, and compile it again where it is loaded."
        )

    def records(self) -> list[GraphRecord]:
        """Those of all graphs that compress videos."""
        return [graph.record for path in self._paths.values() for graph in path.graphs]

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
        arguments, length = {**cut.arguments, name: cut.input_ids}, cut.input_ids.shape[1]
        if name != "input_ids":
            arguments.pop("input_ids", None)
        if self.generation == "transformers":
            shorten_limits(self.model, arguments, dropped=ids.shape[1] - length)
            show_own_prompt(arguments, ids, length)

        @contextmanager
        def around() -> Iterator[None]:
            with generating(left_a_video=False), self._compiled_prefill(cut):
                yield

        with around():
            output = self._own("generate", **arguments)
        mark_cache(cache_of(output), given_cache(call))
        return each_step(with_own_prompt(output, ids, cut.input_ids), around)

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
        if within_generate():  # transformers 5.17 encodes the video here
            return self.own["forward"](**kwargs)
        ids: Any = call.get("input_ids")
        reason = self._reason_to_leave_alone(ids, call, forward=True)
        cut = None if reason else self._compress(ids, call, forward=True)
        if cut is None:
            return self._uncut("forward", (), kwargs, call, reason)
        with self._compiled_prefill(cut):
            return self._own("forward", **cut.arguments)

    def _own(self, method: str, **call: Any) -> Any:
        """The model's own method, with arguments as it calls them."""
        return self.own[method](**self.family.by_its_own_names(call))

    def _uncut(self, method: str, args: tuple[Any, ...], kwargs: Call, call: Call, reason: str | None) -> Any:
        """The model's own method for a call that is left alone: as it came, unless the model cannot take that."""
        changed = call if self._is_closed(method) else for_own_code(call, reason or self.notes[-1])
        return self.own[method](*args, **kwargs) if changed is call else self._own(method, **changed)

    def _is_closed(self, method: str) -> bool:
        """Whether this is a call of, or in, a ``generate()`` that compressed videos cannot reach."""
        return self.generation is None and (method == "generate" or within_generate() is not None)

    def _compiled_prefill(self, cut: "_CutCall") -> AbstractContextManager[None]:
        return nullcontext() if self.prefill is None else self.prefill.active(cut.mask)

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
        reason = reason or self.reason_against_placement()
        if reason is None and forward:
            reason = reason_against_forward(self.model, call)
        elif reason is None and self.generation == "transformers":
            reason = reason_against(self.model, call)
        if reason is None:
            reason = family.reason_against(self.model, call)
        if reason is None:
            return None
        if is_encoded(videos):
            raise EarlyTomConfigError(f"encoded videos cannot be used: {reason[0]}. {reason[1]}.")
        fall_back(*reason, self.config, self.record)
        self._note("uncompressed")
        return reason[0]

    def reason_against_placement(self) -> tuple[str, str] | None:
        """(reason, cure) where the model is placed by now so that its videos cannot be compiled."""
        placed, known = self._placement(), {key[-1] for key in self._paths}
        if placed.hooks not in known and len(known) >= MOST_SETS_OF_HOOKS:
            return (
                f"hooks of the video path have changed {MOST_SETS_OF_HOOKS} times, and each set of them is compiled",
                "Register the same hooks for all calls, and look at observe(model, ...) for what happens inside",
            )
        return placed.reason_against

    def _placement(self) -> Placement:
        return Placement.of(self.model, self.family, asks_for_cuda_graphs(self.config.mode))

    def _checked_videos(self, ids: torch.Tensor, call: Call) -> list[Video] | list[torch.Tensor]:
        """Those of the call: pixels, or rows [K, C] that were encoded before. Raises where something cannot fit."""
        check_prompt(self.family, ids, call.get("attention_mask"))
        given = call["pixel_values_videos"]
        if not is_encoded(given):
            return self.family.videos(self.model, call)
        check_rows(given, self.family.embedding(self.model).embedding_dim)  # type: ignore[arg-type]
        return list(given)

    def _note(
        self, last_call: str, videos: Sequence[tuple[GraphRecord, Counts]] = (), prompt: tuple[int, int] | None = None
    ) -> None:
        """What the report says of this call."""
        self.last_call, self.videos, self.prompt = last_call, list(videos), prompt
        self.compressed = self.compressed or bool(videos)

    @torch.no_grad()
    def _compress(self, ids: torch.Tensor, call: Call, forward: bool = False) -> "_CutCall | None":
        """The call with embeddings in place of pixels, or None to leave it alone."""
        videos = self._checked_videos(ids, call)
        # All that the host has to know of the prompt is read before the encoder is launched: a read after it would
        # wait until the encoder is done, and the device for the host to launch what follows.
        given = call.get("attention_mask")
        host_ids, mask = ids.cpu(), None if given is None else given.cpu()
        if not forward and self.generation == "transformers":
            warn_of_right_padding(self.model, host_ids, mask, call)
            mask = inferred_mask(self.model, host_ids, call) if mask is None else mask
        with weights_in_place(self.model, self.family):
            others = list(self.family.other_rows(self.model, ids, call))
        counts: list[tuple[GraphRecord, Counts]] = []
        encoded, sizes = self._rows_and_sizes(videos, host_ids, counts)
        try:
            places = self._places(host_ids, sizes)
            # What forward() returns has a column for each position, the padded ones too. Images have as many rows.
            wanted = None if forward or mask is None else mask.bool()
            if wanted is not None:
                wanted = functools.reduce(torch.logical_or, (host_ids == token for token, _ in others), wanted)
            plan = PromptCut.plan(host_ids, places, [len(rows) for rows in encoded], wanted)
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
        if isinstance(videos[0], torch.Tensor):
            self._note("given")
        else:
            self._note("compressed" if counts else "uncompressed", counts, (ids.shape[1], new_ids.shape[1]))
        rows = self.family.video_token(self.model), torch.cat(encoded)
        changed = self.family.inputs(self.model, new_ids, [*others, rows])
        if cut_mask is not None and not (given is None and bool(cut_mask.all())):
            # Of a batch without a mask where none can be inferred, transformers says what it thinks itself.
            changed[_MASK] = without_waiting(cut_mask, ids.device)
        if (positions := self.family.position_ids(self.model, call, plan)) is not None:
            changed["position_ids"] = positions
        if call.get("labels") is not None:
            changed["labels"] = plan.take(call["labels"], -100)
        gone = self.family.consumed | {"input_ids", "pixel_values_videos"}
        kept = {name: value for name, value in call.items() if name not in gone}
        return _CutCall(new_ids, {**kept, **changed}, cut_mask)

    @torch.no_grad()
    def encode_videos(self, videos: Sequence[Video]) -> list[torch.Tensor]:
        """See ``earlytom_compile.encode_videos``."""
        self._note("failed")
        counts: list[tuple[GraphRecord, Counts]] = []
        rows = [self._encode(video, counts)[0] for video in videos]
        self._note("encoded", counts)
        return rows

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

    def _rows_and_sizes(
        self,
        videos: Sequence[Video] | Sequence[torch.Tensor],
        ids: torch.Tensor,
        counts: list[tuple[GraphRecord, Counts]],
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Of each video its rows [K, C], and how many placeholders it has in ``ids``; adds to ``counts``."""
        given = [video for video in videos if isinstance(video, torch.Tensor)]
        if given:
            return given, sizes_in_prompt(ids, self.family.video_token(self.model), len(given))
        encoded = [self._encode(video, counts) for video in videos if isinstance(video, Video)]
        return [rows for rows, _ in encoded], [size for _, size in encoded]

    def _encode(self, video: Video, counts: list[tuple[GraphRecord, Counts]]) -> tuple[torch.Tensor, int]:
        """(rows [K, C], rows it would have had uncompressed) of one video; adds to ``counts``."""
        placed = self._placement()
        video = placed.on_device(video)
        frames = len(video.pixels)
        any_length = self.any_length and frames > 1  # PyTorch tells sizes of 1 from all others
        key = (*kind_of(video, any_length), placed.hooks)
        path = self._paths.get(key) or self._paths.setdefault(
            key, VisionPath(self.family, self.config, any_length, self._kinds, describe(video, any_length))
        )
        rows, graph = path(self.model, video)
        if path.broken and (names := placed.names_of_hooked):
            self._blame_hooks(names)
            rows = path.uncompiled(self.model, video)
            return rows, len(rows)
        if graph is not None:
            self.any_length &= graph.any_length or frames == 1  # some models cannot be traced so
            assert graph.record.last_counts is not None
            counts.append((graph.record, graph.record.last_counts))
            return rows, graph.rows_of(frames)
        if not path.told:
            fall_back(
                "Dynamo did not trace the vision path: it is switched off, or a mode that it skips is active",
                "Call without torch.compiler.set_stance, TORCHDYNAMO_DISABLE and TorchDispatchModes around it",
                self.config,
                self.record,
            )
        return rows, len(rows)

    def _blame_hooks(self, names: str) -> None:
        """Once. Such a call runs as it is: Dynamo loses what a hook returns if it breaks the graph."""
        reason = f"hooks in the video path (on {names}) break its graph"
        if reason not in self.notes:
            fall_back(reason, "Take them off, or keep .item() and the like out of them", self.config, self.record)

    def _padding_id(self) -> int:
        padding = option(self.model, {}, "pad_token_id")
        return padding if isinstance(padding, int) and padding != self.family.video_token(self.model) else 0


@dataclass(frozen=True)
class _CutCall:
    """A call whose videos are compressed."""

    input_ids: torch.Tensor  # int64 [R, S'], on the device of the caller's
    arguments: dict[str, Any]  # all others
    mask: torch.Tensor | None  # [R, S'], the attention mask among them, on the host
