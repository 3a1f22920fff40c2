"""In place, for ``generate``: ``earlytom_compile.compile(model, retain_ratio=0.1)``.

    generate(input_ids [R, S], pixel_values_videos [V, F, 3, H, W], ...)
 -> rows = compiled_vision(video) for each video                  # one compilation for a frame count
 -> input_ids, attention_mask cut to the rows that are left       # [R, S'], left-padded where rows differ
 -> the model's own generate(input_ids, inputs_embeds, ...)       # cache, beams, streamers agree by construction
 -> the caller's own prompt ids, then the new tokens

``torch.compile(model).generate`` would never run compiled code: the compiled module forwards ``generate`` to the
original one. Videos are encoded one at a time, so that a row's answer does not depend on its batch.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..backend import compile_graph
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..prompt import PromptCut, UncuttablePrompt
from ..reporting import Counts, GraphRecord, forget
from ..stages import CompressedGraph, fall_back
from .tracing import make_traceable

_HANDLE = "_earlytom"
_REPLACED = ("forward", "generate")


def compile(model: torch.nn.Module, **options: Any) -> torch.nn.Module:  # noqa: A001
    """Make ``model`` compress its videos in ``generate()`` and ``forward()``; returns the same model.

    ``options`` are those of :class:`EarlyTomConfig`; bad ones raise :class:`EarlyTomConfigError` now. Calling it
    again replaces the options. Promises: ``generate`` returns the caller's own prompt ids followed by the new
    tokens; :func:`restore` undoes it exactly; a call without a video runs the model's own code.
    """
    config = EarlyTomConfig.from_options(options)
    _require_supported(model)
    layers = _layers_that_count(model)
    if layers is not None:
        config.resolve_merge_layers(layers)
    restore(model)
    make_traceable()
    handle = CompiledModel(model, config)
    model.__dict__[_HANDLE] = handle
    for name in _REPLACED:
        model.__dict__[name] = _Method(handle, name, getattr(model, name))
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`compile` exactly; does nothing to a model that is not compiled. Returns the same model."""
    handle = model.__dict__.pop(_HANDLE, None)
    if handle is not None:
        for name in _REPLACED:
            del model.__dict__[name]
        model.__dict__.update(handle.replaced)
        forget(model)
    return model


class CompiledModel:
    """What :func:`compile` adds to a model: its options, its compiled vision paths, and the last call's numbers."""

    def __init__(self, model: torch.nn.Module, config: EarlyTomConfig) -> None:
        self.model: Any = model
        self.config = config
        self.replaced = {name: model.__dict__[name] for name in _REPLACED if name in model.__dict__}
        self.own = {name: getattr(model, name) for name in _REPLACED}
        self.prompt: tuple[int, int] | None = None
        self.videos: list[tuple[GraphRecord, Counts]] = []
        self.record = GraphRecord("", False)
        self._paths: dict[Any, _VisionPath] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model compiles for itself: compiled code belongs to the weights it was traced with.
        return {**self.__dict__, "_paths": {}, "videos": []}

    @property
    def notes(self) -> list[str]:
        """Reasons why a call ran uncompressed."""
        return self.record.reasons

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with compressed videos; see :func:`compile`."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        reason = _reason_to_leave_alone(ids, kwargs)
        cut = None if reason else self._compress(ids, kwargs)  # type: ignore[arg-type]
        if cut is None:
            if reason and kwargs.get("pixel_values_videos") is not None:
                fall_back(*reason, self.config, self.record)
            arguments = (inputs, *args) if inputs is not None or args else ()
            return self.own["generate"](*arguments, **kwargs)
        new_ids, new_kwargs, plan = cut
        _shorten_limits(new_kwargs, args, plan.dropped)
        if new_kwargs.get("streamer") is not None:
            new_kwargs["streamer"] = _PromptStreamer(new_kwargs["streamer"], ids)  # type: ignore[arg-type]
        output = self.own["generate"](new_ids, *args, **new_kwargs)
        return _with_own_prompt(output, ids, new_ids.shape[1])  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model.forward`` with compressed videos: logits have the cut length."""
        own = self.own["forward"]
        if args:
            names = list(inspect.signature(own).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if kwargs.get("pixel_values_videos") is None:
            return own(**kwargs)
        ids = kwargs.get("input_ids")
        reason = _reason_to_leave_alone(ids, kwargs)
        if reason is None and torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            reason = (
                "gradients are enabled and the model's parameters require them; compression is for inference only",
                "Wrap the call in torch.inference_mode() or torch.no_grad()",
            )
        if reason is not None:
            fall_back(*reason, self.config, self.record)
        cut = None if reason else self._compress(ids, kwargs)  # type: ignore[arg-type]
        return own(**kwargs) if cut is None else own(**cut[1])

    @torch.no_grad()
    def _compress(
        self, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any], PromptCut] | None:
        """(cut ids, arguments with embeddings in place of pixels, the cut), or None to leave the call alone."""
        videos = kwargs["pixel_values_videos"]
        choices = {k: kwargs[k] for k in _FEATURE_CHOICES if kwargs.get(k) is not None}
        self.videos = []
        encoded = [self._encode(video, choices) for video in videos]
        token = self.model.config.video_token_id
        try:
            plan = PromptCut.plan(ids, token, [n for _, n in encoded], [len(rows) for rows, _ in encoded])
        except UncuttablePrompt as reason:
            fall_back(str(reason), "Write each video as one <video> in the prompt", self.config, self.record)
            return None
        new_ids = plan.take(ids, _padding_id(self.model, token))
        self.prompt = (ids.shape[1], new_ids.shape[1])
        embeds = self._embed(new_ids, torch.cat([rows for rows, _ in encoded]), kwargs)
        changed = {"inputs_embeds": embeds, "attention_mask": self._cut_mask(ids, plan, kwargs)}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = plan.renumber(kwargs["position_ids"])
        if kwargs.get("labels") is not None:
            changed["labels"] = plan.take(kwargs["labels"], -100)
        kept = {k: v for k, v in kwargs.items() if k not in _CONSUMED}
        return new_ids, {**kept, **changed}, plan

    def _encode(self, video: torch.Tensor, choices: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """(rows [K, C], rows it would have had uncompressed) of one video [F, 3, H, W]."""
        key = (tuple(video.shape), video.dtype, video.device, repr(choices))
        path = self._paths.get(key) or self._paths.setdefault(key, _VisionPath(self.config))
        rows, before = path(self.model, video, choices)
        if path.graph is not None:
            record = path.graph.record
            if record.last_counts is not None:
                self.videos.append((record, record.last_counts))
        return rows, before

    def _embed(self, ids: torch.Tensor, video_rows: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Embeddings [R, S', C] of the cut prompt, images encoded by the model's own code."""
        model = self.model.model
        embeds = model.get_input_embeddings()(ids)
        if kwargs.get("pixel_values") is not None:
            names = (
                "pixel_values",
                "image_sizes",
                "vision_aspect_ratio",
                "batch_num_images",
                *_FEATURE_CHOICES,
            )
            given = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
            images = torch.cat(list(model.get_image_features(**given, return_dict=True).pooler_output), dim=0)
            images = images.to(embeds.device, embeds.dtype)
            mask, _ = model.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=images)
            embeds = embeds.masked_scatter(mask, images)
        video_rows = video_rows.to(embeds.device, embeds.dtype)
        mask = (ids == self.model.config.video_token_id).unsqueeze(-1)
        return embeds.masked_scatter(mask, video_rows)

    def _cut_mask(self, ids: torch.Tensor, plan: PromptCut, kwargs: dict[str, Any]) -> torch.Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            # What generate() would infer from ids; it cannot from embeddings.
            padding = getattr(self.model.generation_config, "pad_token_id", None)
            mask = torch.ones_like(ids) if padding is None else ids.ne(padding).to(ids.dtype)
            if not plan.padded and bool(mask.all()):
                return None
        return plan.take(mask, 0)


class _VisionPath:
    """The compiled vision path for one video shape."""

    def __init__(self, config: EarlyTomConfig) -> None:
        self._config = config
        self._graphs: list[CompressedGraph] = []
        # Dynamo's recompile limit counts per code object; every frame count gets one of its own.
        code = _video_rows.__code__.replace(co_name=f"video_rows_{id(self)}")
        function = types.FunctionType(code, globals(), code.co_name)
        self._compiled = torch.compile(function, backend=self._backend, dynamic=False)

    @property
    def graph(self) -> CompressedGraph | None:
        """The graph of the last call, None if it ran uncompressed."""
        return max(self._graphs, key=lambda graph: graph.record.last_call, default=None)

    def __call__(self, model: Any, video: torch.Tensor, choices: dict[str, Any]) -> tuple[torch.Tensor, int]:
        rows = self._compiled(model, video.unsqueeze(0), choices)[0]
        return rows, self.graph.rows_per_video if self.graph is not None else len(rows)

    def _backend(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(graph_module, example_inputs, self._config, features_only=True)
        if isinstance(compiled, CompressedGraph):
            self._graphs.append(compiled)
        return compiled


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


class _PromptStreamer:
    """Hands a streamer the caller's own prompt in place of the cut one, then every token as it comes."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = input_ids

    def put(self, value: torch.Tensor) -> None:
        """The first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.to(value.device), None
        self._streamer.put(value)

    def end(self) -> None:
        """No more tokens."""
        self._streamer.end()


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
        *_FEATURE_CHOICES,
    )
)


def _require_supported(model: Any) -> None:
    from transformers import LlavaOnevisionForConditionalGeneration

    if not isinstance(model, LlavaOnevisionForConditionalGeneration):
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


def _reason_to_leave_alone(ids: torch.Tensor | None, kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """(reason, cure) for a call that is not a prompt with videos."""
    if kwargs.get("pixel_values_videos") is None:
        return "no video in this call", "Pass pixel_values_videos"
    if not isinstance(ids, torch.Tensor) or kwargs.get("inputs_embeds") is not None:
        return "the prompt is not given as input_ids", "Pass input_ids, not inputs_embeds"
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return "the call continues a cache that was filled uncompressed", "Start with an empty cache"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "the attention mask is not [rows, prompt length]", "Pass the attention_mask of the processor"
    return None


def _padding_id(model: Any, video_token: int) -> int:
    padding = getattr(model.generation_config, "pad_token_id", None)
    return padding if isinstance(padding, int) and padding != video_token else 0


def _shorten_limits(kwargs: dict[str, Any], args: tuple[Any, ...], dropped: int) -> None:
    """``max_length`` and ``min_length`` count the prompt, which is ``dropped`` tokens shorter now."""
    config = kwargs.get("generation_config", args[0] if args else None)
    for name in ("max_length", "min_length"):
        limit = kwargs.get(name, getattr(config, name, None))
        new_tokens = name.replace("_length", "_new_tokens")
        if limit and kwargs.get(new_tokens, getattr(config, new_tokens, None)) is None:
            kwargs[name] = max(limit - dropped, 0)


def _with_own_prompt(output: Any, ids: torch.Tensor, cut_length: int) -> Any:
    """Put the caller's prompt ids back in front of the new tokens, for each returned sequence."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = ids.to(sequences.device).repeat_interleave(sequences.shape[0] // ids.shape[0], dim=0)
    sequences = torch.cat((prompts, sequences[:, cut_length:]), dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
