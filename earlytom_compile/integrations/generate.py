"""In place, for ``generate``: ``earlytom_compile.compile(model, retain_ratio=0.1)``.

    generate(input_ids [R, S], pixel_values_videos [V, F, 3, H, W], ...)
 -> rows = compiled_vision(video) for each video                  # one compilation for all numbers of frames
 -> input_ids, attention_mask cut to the rows that are left       # [R, S'], left-padded where rows differ
 -> the model's own generate(input_ids, inputs_embeds, ...)       # cache, beams, streamers agree by construction;
                                                                  # the prompt's pass through the language model
                                                                  # is compiled once for all lengths (prefill.py)
 -> the caller's own prompt ids, then the new tokens

``torch.compile(model).generate`` would never run compiled code: the compiled module forwards ``generate`` to the
original one. Videos are encoded one at a time, so that a row's answer does not depend on its batch.
"""

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ..backend import compile_graph
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError, EarlyTomError
from ..prompt import PromptCut, UncuttablePrompt, sizes_in_prompt, without_waiting
from ..reporting import Counts, GraphRecord, forget, note_restored
from ..stages import CompressedGraph, Kinds, asks_for_cuda_graphs, fall_back
from ..words import counted
from .caches import cache_of, given_cache
from .generation import (
    inferred_mask,
    named_arguments,
    reason_against,
    shorten_limits,
    show_own_prompt,
    warn_of_right_padding,
    with_own_prompt,
)
from .prefill import CompiledPrefill
from .tracing import FirstCallAlone, make_traceable, mark_static, with_its_own_code

log = logging.getLogger(__name__)
_HANDLE = "_earlytom"
_REPLACED = ("forward", "generate")


def compile(model: torch.nn.Module, **options: Any) -> torch.nn.Module:  # noqa: A001
    """Make ``model`` compress its videos in ``generate()`` and ``forward()``; returns the same model.

    ``options`` are those of :class:`EarlyTomConfig`; bad ones raise :class:`EarlyTomConfigError` now. Calling it
    again replaces the options; what was compiled stays where it does not depend on them: all of it with the same
    options, the layers with another ``retain_ratio``. Promises: ``generate`` returns the caller's own prompt ids
    followed by the new tokens; :func:`restore` undoes it exactly; a call without a video runs the model's own code.
    """
    config = EarlyTomConfig.from_options(options)
    _require_supported(model)
    layers = _layers_that_count(model)
    if layers is not None:
        config.resolve_merge_layers(layers)
    before: CompiledModel | None = model.__dict__.get(_HANDLE)
    if before is not None and before.config == config and before.is_in_place():
        return model
    restore(model)
    make_traceable()
    handle = CompiledModel(model, config)
    model.__dict__[_HANDLE] = handle
    note_restored(model, False)
    for name in _REPLACED:
        model.__dict__[name] = _Method(handle, name, getattr(model, name))
    if before is not None:
        handle.take_over(before)
    if config.compile_llm and config.lowering != "eager":
        if handle.prefill is None:
            handle.prefill = CompiledPrefill(handle.model.model.language_model, config.lowering, config.mode)
        handle.prefill.install()
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`compile` exactly; does nothing to a model that is not compiled. Returns the same model.

    Raises :class:`EarlyTomConfigError` for what is no model."""
    if not isinstance(model, torch.nn.Module):
        raise EarlyTomConfigError(f"restore() got a {type(model).__name__}; it takes what compile() returned.")
    handle = model.__dict__.pop(_HANDLE, None)
    if handle is not None:
        for name in _REPLACED:
            if isinstance(model.__dict__.get(name), _Method):  # not a wrapper that somebody put there since
                del model.__dict__[name]
        model.__dict__.update({k: v for k, v in handle.replaced.items() if k not in model.__dict__})
        if handle.prefill is not None:
            handle.prefill.remove()
        forget(model)
        note_restored(model, True)
    return model


def encode_videos(model: torch.nn.Module, pixel_values_videos: Any) -> list[torch.Tensor]:
    """The compressed tokens of each video, as the language model gets them: for many questions about one video.

    ``model`` is what :func:`compile` returned; ``pixel_values_videos`` [V, F, 3, H, W], or a sequence of videos
    [F, 3, H, W]. Returns ``V`` tensors [K + 1, C] in the model's dtype, the newline last. Give them to ``generate()``
    or ``forward()`` as ``pixel_values_videos``, as often as there are questions, with one ``<video>`` for each in
    ``input_ids`` (or as many as the processor writes)::

        videos = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
        ids = processor.tokenizer(prompt, return_tensors="pt")
        model.generate(**ids, pixel_values_videos=videos)

    Raises :class:`EarlyTomConfigError` if the model is not compiled or a video has another shape.
    """
    handle = model.__dict__.get(_HANDLE)
    if handle is None:
        raise EarlyTomConfigError("the model is not compiled: call earlytom_compile.compile(model) first.")
    _require_tensors(pixel_values_videos)
    if _encoded(pixel_values_videos):
        raise EarlyTomConfigError("these videos are encoded already: give them to generate() as pixel_values_videos.")
    _check_videos(pixel_values_videos, handle.model.config.vision_config)
    return handle.encode_videos(pixel_values_videos)


class CompiledModel:
    """What :func:`compile` adds to a model: its options, its compiled vision paths, and the last call's numbers."""

    def __init__(self, model: torch.nn.Module, config: EarlyTomConfig) -> None:
        self.model: Any = model
        self.config = config
        self.replaced = {name: model.__dict__[name] for name in _REPLACED if name in model.__dict__}
        self.own = {name: getattr(model, name) for name in _REPLACED}
        self.prompt: tuple[int, int] | None = None
        self.videos: list[tuple[GraphRecord, Counts]] = []
        self.last_call: str | None = None  # what became of it, in the words of reporting.Report.last_call
        self.compressed = False  # whether any call was
        self.record = GraphRecord("", False)
        self._paths: dict[Any, _VisionPath] = {}
        # A CUDA graph replays fixed sizes, and none is captured behind a size that is not known.
        self.any_length = not asks_for_cuda_graphs(config.mode)
        self._kinds: Kinds = {}
        self.prefill: CompiledPrefill | None = None

    def is_in_place(self) -> bool:
        """Whether nobody has put something else over the methods of the model since."""
        return all(isinstance(self.model.__dict__.get(name), _Method) for name in _REPLACED)

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

    @property
    def notes(self) -> list[str]:
        """Reasons why a call ran uncompressed."""
        return self.record.reasons

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with compressed videos; see :func:`compile`."""
        kwargs = named_arguments(self.model, args, kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        reason = self._reason_to_leave_alone(ids, kwargs)
        cut = None if reason else self._compress(ids, kwargs)  # type: ignore[arg-type]
        if cut is None:
            kwargs = _for_own_code(kwargs, reason or self.notes[-1])
            with _generating(left_a_video=reason != _NO_VIDEO):
                return self.own["generate"](*(() if inputs is None else (inputs,)), **kwargs)
        assert ids is not None
        length = cut.input_ids.shape[1]
        shorten_limits(self.model, cut.arguments, dropped=ids.shape[1] - length)
        show_own_prompt(cut.arguments, ids, length)
        with _generating(left_a_video=False), self._compiled_prefill(cut):
            output = self.own["generate"](cut.input_ids, **cut.arguments)
        _mark_cache(cache_of(output), given_cache(kwargs))
        return with_own_prompt(output, ids, length)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model.forward`` with compressed videos: logits have the cut length."""
        own = self.own["forward"]
        if args:
            names = list(inspect.signature(own).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true while any other thread compiles
            if kwargs.get("pixel_values_videos") is None and _features(kwargs).get("video") is None:
                return own(**kwargs)  # transformers compiles decoding steps: let it see the model alone
            # Behind a graph break: traced by another torch.compile, our own would do nothing.
            return torch.compiler.disable(self.forward)(**kwargs)
        if _GENERATING.get():  # transformers 5.17 encodes the video here
            return own(**kwargs)
        ids = kwargs.get("input_ids")
        reason = self._reason_to_leave_alone(ids, kwargs, forward=True)
        cut = None if reason else self._compress(ids, kwargs, forward=True)  # type: ignore[arg-type]
        if cut is None:
            return own(**_for_own_code(kwargs, reason or self.notes[-1]))
        with self._compiled_prefill(cut):
            return own(**cut.arguments)

    def _compiled_prefill(self, cut: "_CutCall") -> AbstractContextManager[None]:
        return nullcontext() if self.prefill is None else self.prefill.active(cut.mask)

    def _reason_to_leave_alone(self, ids: Any, kwargs: dict[str, Any], forward: bool = False) -> str | None:
        """Why the call runs uncompressed, said in a warning unless it simply has no video."""
        videos = kwargs.get("pixel_values_videos")
        _require_tensors(videos)
        if videos is None or len(videos) == 0:
            _refuse_compressed_cache(given_cache(kwargs), ids, self.model.config.video_token_id)
            if _GENERATING.get() is not None:
                return _NO_VIDEO
            if _features(kwargs).get("video") is not None:
                self._note("failed")
                fall_back(*_ALREADY_ENCODED, self.config, self.record)
                self._note("uncompressed")
            elif not _continues(kwargs):  # else it is one of many steps of a call
                self._note(_NO_VIDEO)
            return _NO_VIDEO
        if _pixels_and_features(kwargs, forward):
            return "the model's own code refuses the call, with an error of its own"
        if not self.compressed:
            log.info("the first call with a video: tracing the model, which compiles before it answers ...")
        self._note("failed")  # unless nothing else is noted
        reason = _reason_against(ids, kwargs)
        if reason is None:
            reason = self._reason_against_forward(kwargs) if forward else reason_against(self.model, kwargs)
        if reason is None:
            _check_shapes(ids, videos, kwargs.get("attention_mask"), self.model.config.vision_config)
            if _encoded(videos):
                _check_rows(videos, self.model.config.text_config.hidden_size)
            return None
        if _encoded(videos):
            raise EarlyTomConfigError(f"encoded videos cannot be used: {reason[0]}. {reason[1]}.")
        fall_back(*reason, self.config, self.record)
        self._note("uncompressed")
        return reason[0]

    def _note(
        self, last_call: str, videos: Sequence[tuple[GraphRecord, Counts]] = (), prompt: tuple[int, int] | None = None
    ) -> None:
        """What the report says of this call."""
        self.last_call, self.videos, self.prompt = last_call, list(videos), prompt
        self.compressed = self.compressed or bool(videos)

    def _reason_against_forward(self, kwargs: dict[str, Any]) -> tuple[str, str] | None:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            return (
                "gradients are enabled and the model's parameters require them; compression is for inference only",
                "Wrap the call in torch.inference_mode() or torch.no_grad()",
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            return "logits_to_keep names positions of the uncut prompt", "Give logits_to_keep as a number"
        return None

    @torch.no_grad()
    def _compress(self, ids: torch.Tensor, kwargs: dict[str, Any], forward: bool = False) -> "_CutCall | None":
        """The call with embeddings in place of pixels, or None to leave it alone."""
        # All that the host has to know of the prompt is read before the encoder is launched: a read after it would
        # wait until the encoder is done, and the device for the host to launch what follows.
        given = kwargs.get("attention_mask")
        host_ids, mask = ids.cpu(), None if given is None else given.cpu()
        if not forward:
            warn_of_right_padding(self.model, host_ids, mask, kwargs)
            mask = inferred_mask(self.model, host_ids, kwargs) if mask is None else mask
        images = self._image_rows(ids, kwargs)
        videos = kwargs["pixel_values_videos"]
        choices = {k: kwargs[k] for k in _FEATURE_CHOICES if kwargs.get(k) is not None}
        counts: list[tuple[GraphRecord, Counts]] = []
        token = self.model.config.video_token_id
        if _encoded(videos):
            encoded = list(zip(videos, sizes_in_prompt(host_ids, token, len(videos)), strict=True))
        else:
            encoded = [self._encode(video, choices, counts) for video in videos]
        try:
            sizes = [n for _, n in encoded], [len(rows) for rows, _ in encoded]
            # What forward() returns has a column for each position, the padded ones too. Images have as many rows.
            wanted = None if forward or mask is None else mask.bool() | (host_ids == self.model.config.image_token_id)
            plan = PromptCut.plan(host_ids, token, *sizes, mask=wanted)
        except UncuttablePrompt as reason:
            fall_back(str(reason), "Write each video as one <video> in the prompt", self.config, self.record)
            self._note("uncompressed")
            return None
        if mask is None and plan.padded:
            mask = torch.ones_like(host_ids)
        cut_mask = None if mask is None else plan.take(mask, 0)
        new_ids = without_waiting(plan.take(host_ids, _padding_id(self.model, token)), ids.device)
        if _encoded(videos):
            self._note("given")
        else:
            self._note("compressed" if counts else "uncompressed", counts, (ids.shape[1], new_ids.shape[1]))
        embeds = self._embed(new_ids, torch.cat([rows for rows, _ in encoded]), images)
        changed: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": None}
        if cut_mask is not None and not (given is None and bool(cut_mask.all())):
            # Of a batch without a mask where none can be inferred, transformers says what it thinks itself.
            changed["attention_mask"] = without_waiting(cut_mask, ids.device)
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = plan.renumber(kwargs["position_ids"])
        if kwargs.get("labels") is not None:
            changed["labels"] = plan.take(kwargs["labels"], -100)
        kept = {k: v for k, v in kwargs.items() if k not in _CONSUMED}
        return _CutCall(new_ids, {**kept, **changed}, cut_mask)

    @torch.no_grad()
    def encode_videos(self, videos: Any) -> list[torch.Tensor]:
        """See :func:`encode_videos`."""
        self._note("failed")
        counts: list[tuple[GraphRecord, Counts]] = []
        rows = [self._encode(video, {}, counts)[0] for video in videos]
        self._note("encoded", counts)
        return rows

    def _encode(
        self, video: torch.Tensor, choices: dict[str, Any], counts: list[tuple[GraphRecord, Counts]]
    ) -> tuple[torch.Tensor, int]:
        """(rows [K, C], rows it would have had uncompressed) of one video [F, 3, H, W]; adds to ``counts``."""
        frames, *picture = video.shape
        any_length = self.any_length and frames > 1  # PyTorch tells sizes of 1 from all others
        key = (None if any_length else frames, *picture, video.dtype, video.device, repr(choices))
        path = self._paths.get(key) or self._paths.setdefault(
            key, _VisionPath(self.config, any_length, self._kinds, _for_videos(video, any_length))
        )
        rows, graph = path(self.model, video, choices)
        if graph is not None:
            self.any_length &= graph.any_length or frames == 1  # some models cannot be traced so
            assert graph.record.last_counts is not None
            counts.append((graph.record, graph.record.last_counts))
            return rows, graph.rows_of(len(video))
        if not path.told:
            fall_back(
                "Dynamo did not trace the vision path: it is switched off, or a mode that it skips is active",
                "Call without torch.compiler.set_stance, TORCHDYNAMO_DISABLE and TorchDispatchModes around it",
                self.config,
                self.record,
            )
        return rows, len(rows)

    def _embed(self, ids: torch.Tensor, videos: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [R, S', C] of the cut prompt, with the rows [N, C] of its videos and images in place."""
        embeds = self.model.model.get_input_embeddings()(ids)
        config = self.model.config
        for token, rows in ((config.image_token_id, images), (config.video_token_id, videos)):
            if rows is not None:
                rows = rows.to(embeds.device, embeds.dtype)
                embeds = embeds.masked_scatter((ids == token).unsqueeze(-1), rows)
        return embeds

    def _image_rows(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Rows [N, C] of all images, as many as their placeholders: encoded by the model's own code, or by the
        caller before."""
        model = self.model.model
        encoded = _features(kwargs).get("image")
        if encoded is None and kwargs.get("pixel_values") is not None:
            names = ("pixel_values", "image_sizes", "vision_aspect_ratio", "batch_num_images", *_FEATURE_CHOICES)
            given = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
            encoded = model.get_image_features(**given, return_dict=True)
        if encoded is None:
            return None
        rows = torch.cat(list(encoded.pooler_output), dim=0)
        model.get_placeholder_mask(ids, inputs_embeds=rows.new_empty(*ids.shape, rows.shape[1]), image_features=rows)
        return rows


@dataclass(frozen=True)
class _CutCall:
    """A call whose videos are compressed."""

    input_ids: torch.Tensor  # int64 [R, S'], on the device of the caller's
    arguments: dict[str, Any]  # all others
    mask: torch.Tensor | None  # [R, S'], the attention mask among them, on the host


class _VisionPath:
    """The compiled vision path for one resolution and, unless ``any_length``, one number of frames."""

    def __init__(self, config: EarlyTomConfig, any_length: bool, kinds: Kinds, cause: str) -> None:
        self._config = config
        self._cause = cause
        self._kinds = kinds
        self._any_length = any_length
        self._graphs: list[CompressedGraph] = []
        self._traced = False
        make_traceable()  # libraries that were imported since compile()
        self._compiled = FirstCallAlone(torch.compile(with_its_own_code(_video_rows), backend=self._backend))

    @property
    def told(self) -> bool:
        """Whether compiling gave reasons, in warnings, why calls run uncompressed."""
        return self._traced and not self._graphs

    def __call__(
        self, model: Any, video: torch.Tensor, choices: dict[str, Any]
    ) -> tuple[torch.Tensor, CompressedGraph | None]:
        """Rows [K, C], and the graph that compressed them in this call, None if none did."""
        start = time.monotonic()
        videos = video.unsqueeze(0)
        # Not dynamic=False: that changes Dynamo's configuration in every call, which torch 2.11 has one of for all
        # threads. Two that meet there leave the whole process without automatic dynamic shapes.
        if self._any_length:
            mark_static(videos, 0, 2, 3, 4)
            torch._dynamo.maybe_mark_dynamic(videos, 1)
        else:
            mark_static(videos, 0, 1, 2, 3, 4)
        rows = self._compiled(model, videos, choices)[0]
        return rows, next((graph for graph in self._graphs if graph.record.last_call >= start), None)

    def _backend(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._traced = True
        compiled = compile_graph(
            graph_module, example_inputs, self._config, features_only=True, kinds=self._kinds, cause=self._cause
        )
        if isinstance(compiled, CompressedGraph):
            self._graphs.append(compiled)
        return compiled


def _for_videos(video: torch.Tensor, any_length: bool) -> str:
    """What a vision path is for, for the report."""
    frames, _, height, width = video.shape
    length = "2 and more frames" if any_length else counted(frames, "frame")
    return f"videos of {length}, {height}x{width}, {str(video.dtype).removeprefix('torch.')} on {video.device}"


def _video_rows(model: Any, video: torch.Tensor, choices: dict[str, Any]) -> torch.Tensor:
    """Rows [1, F*P+1, C] of one video [1, F, 3, H, W], newline included, by the model's own code."""
    inner = model.model
    rows = inner.get_video_features(video, return_dict=True, **choices).pooler_output
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if rows.shape[1] == video.shape[1] * ((side + 1) // 2) ** 2:
        # transformers 5.17 adds the newline in forward(), 5.23 in get_video_features().
        rows = torch.cat((rows, inner.image_newline[None, None, :].to(rows.device)), dim=1)
    return rows


class _Method:
    """Stands in for a method of the model, with the method's own signature; copies along with the model."""

    def __init__(self, handle: CompiledModel, name: str, own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._handle = handle
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._handle, self._name)(*args, **kwargs)


_FEATURE_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")
_CONSUMED = frozenset(
    (
        "input_ids",
        "pixel_values",
        "pixel_values_videos",
        "image_sizes",
        "image_sizes_videos",
        "vision_aspect_ratio",
        "batch_num_images",
        "mm_encoder_outputs",
        *_FEATURE_CHOICES,
    )
)
_ALREADY_ENCODED = (
    "the video is given as features (mm_encoder_outputs), which reach the language model as they are",
    "Pass pixel_values_videos to have it compressed",
)
_NO_VIDEO = "no video"
_GENERATING: ContextVar[bool | None] = ContextVar("earlytom_generating", default=None)


@contextmanager
def _generating(left_a_video: bool) -> Iterator[None]:
    """Inside, features that reach ``forward`` are those of ``generate``, which encodes before the prompt's pass; and a
    video that ``generate`` has left alone, with a warning, ``forward`` leaves alone."""
    token = _GENERATING.set(left_a_video)
    try:
        yield
    finally:
        _GENERATING.reset(token)


def _features(kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """What the caller encoded before the call, by ``"image"`` and ``"video"``."""
    return kwargs.get("mm_encoder_outputs") or {}


def _continues(kwargs: dict[str, Any]) -> bool:
    """Whether a call goes on behind a prompt that is in the cache already."""
    cache = given_cache(kwargs)
    return hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0


def _pixels_and_features(kwargs: dict[str, Any], forward: bool) -> bool:
    """Whether a call with pixels of videos also brings features that transformers refuses beside them."""
    if forward:
        return kwargs.get("mm_encoder_outputs") is not None
    given = {"image": kwargs.get("pixel_values"), "video": kwargs.get("pixel_values_videos")}
    return any(_features(kwargs).get(kind) is not None and pixels is not None for kind, pixels in given.items())


def is_supported(model: Any) -> bool:
    """Whether :func:`compile` knows this kind of model."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return isinstance(model, LlavaOnevisionForConditionalGeneration)


def _require_supported(model: Any) -> None:
    if not is_supported(model):
        if hasattr(model, "get_base_model") and is_supported(model.get_base_model()):  # PEFT's
            raise EarlyTomConfigError(
                f"earlytom_compile.compile() got a {type(model).__name__} around the model: call "
                "earlytom_compile.compile(model.get_base_model()), and go on with model.generate()."
            )
        raise EarlyTomConfigError(
            f"earlytom_compile.compile() knows LlavaOnevisionForConditionalGeneration of transformers; got "
            f'{type(model).__name__}. For other models try torch.compile(model, backend="earlytom").'
        )


def _layers_that_count(model: Any) -> int | None:
    """Encoder layers up to the one whose output the projector takes, None if there are several."""
    total, taken = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    if not isinstance(taken, int):
        return None
    return taken if taken >= 0 else total + 1 + taken


def _reason_against(ids: Any, kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """(reason, cure) for a call with videos that is not a prompt with placeholders."""
    if not isinstance(ids, torch.Tensor) or kwargs.get("inputs_embeds") is not None:
        return "the prompt is not given as input_ids", "Pass input_ids, not inputs_embeds"
    cache = given_cache(kwargs)
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        return "the call continues a cache that is already filled", "Start with an empty cache"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "the attention mask is not [rows, prompt length]", "Pass the attention_mask of the processor"
    return None


def _check_shapes(ids: torch.Tensor, videos: Any, mask: torch.Tensor | None, tower: Any) -> None:
    if ids.dim() != 2:
        raise EarlyTomConfigError(f"input_ids have shape {tuple(ids.shape)}; they must be [rows, prompt length].")
    _check_videos(videos, tower)
    if mask is not None and mask.shape != ids.shape:
        raise EarlyTomConfigError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; they must be equal."
        )


def _require_tensors(videos: Any) -> None:
    """Raise for anything but None, a tensor, or a list of tensors."""
    if videos is None or isinstance(videos, torch.Tensor):
        return
    given = f"a {type(videos).__name__}"
    if isinstance(videos, list | tuple):
        others = [type(video).__name__ for video in videos if not isinstance(video, torch.Tensor)]
        if videos and not others:
            return
        given += f" of {others[0]}" if others else " of nothing"
    raise EarlyTomConfigError(
        f"pixel_values_videos: {given}; must be a tensor [videos, frames, channels, height, width] or a list of "
        "tensors, as the model's processor makes them. Leave it out where there is no video."
    )


def _check_videos(videos: Any, tower: Any) -> None:
    """Raise for what the vision tower, known by its configuration, cannot take: it would say so in its own words."""
    if _encoded(videos):
        return
    picture = (tower.num_channels, tower.image_size, tower.image_size)
    for video in videos:
        if video.dim() != 4 or len(video) == 0 or tuple(video.shape[1:]) != picture:
            shape = tuple(videos.shape) if isinstance(videos, torch.Tensor) else [tuple(v.shape) for v in videos]
            raise EarlyTomConfigError(
                f"pixel_values_videos have shape {shape}; they must be [videos, frames, channels, height, width], or a "
                "list of [frames, channels, height, width], with at least one frame each, and this model's vision "
                f"tower takes {picture} (channels, height, width). Prepare videos with the model's processor."
            )


def _encoded(videos: Any) -> bool:
    """Whether these are rows [K + 1, C] that :func:`encode_videos` made."""
    return not isinstance(videos, torch.Tensor) and len(videos) > 0 and all(video.dim() == 2 for video in videos)


def _check_rows(videos: Sequence[torch.Tensor], width: int) -> None:
    for video in videos:
        if video.shape[1] != width or not len(video):
            raise EarlyTomConfigError(
                f"an encoded video has shape {tuple(video.shape)}; it must be [rows, {width}], as "
                "earlytom_compile.encode_videos(model, ...) returns it for this model."
            )


def _for_own_code(kwargs: dict[str, Any], reason: str) -> dict[str, Any]:
    """The arguments of a call that runs the model's own code, which takes videos as one tensor only."""
    videos = kwargs.get("pixel_values_videos")
    if videos is None or isinstance(videos, torch.Tensor) or not len(videos):
        return kwargs
    if len({video.shape for video in videos}) > 1:
        raise EarlyTomConfigError(
            f"videos of shapes {[tuple(video.shape) for video in videos]} can only run compressed, but {reason}. Cure "
            "that, or give videos of different lengths in calls of their own."
        )
    return {**kwargs, "pixel_values_videos": torch.stack(list(videos))}


_CACHE_MARK = "_earlytom_compressed"


def _mark_cache(*caches: Any) -> None:
    """Remember that these caches hold a cut prompt, which the caller's ids no longer describe."""
    for cache in caches:
        if cache is not None and hasattr(cache, "__dict__"):
            setattr(cache, _CACHE_MARK, True)


def _refuse_compressed_cache(cache: Any, ids: Any, video_token: int) -> None:
    if getattr(cache, _CACHE_MARK, False) and isinstance(ids, torch.Tensor) and bool((ids == video_token).any()):
        raise EarlyTomConfigError(
            "the cache holds a prompt whose video tokens were cut, and input_ids still have all of them. Start the "
            "next turn without a cache, with the whole conversation and its video; earlytom_compile.encode_videos() "
            "saves encoding it again."
        )


def _padding_id(model: Any, video_token: int) -> int:
    padding = getattr(model.generation_config, "pad_token_id", None)
    return padding if isinstance(padding, int) and padding != video_token else 0
