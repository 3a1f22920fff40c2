"""The seam between one model family and everything else, which never names a family.

    generate(input_ids [R, S], pixel_values_videos ..., ...)
 -> videos(model, call)                   # a Video each: pixels [F, ...] and what else its encoder takes
 -> rows(model, pixels [1, F, ...])       # [N, C] by the model's own code, which is traced and compressed: [K, C]
 -> places(model, ids, sizes)             # the placeholders of each video in the prompt, N before the cut, K after
 -> inputs(model, cut ids, rows)          # embeddings [R, S', C] of the cut prompt; images as they were (other_rows)
 -> the model's own generate(cut ids, inputs_embeds=..., position_ids=..., ...)

The defaults are what most models of transformers do. ``docs/adding-a-model.md`` goes through it with an example.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from torch import Tensor, nn

from ..errors import EarlyTomConfigError
from ..prompt import Places, PromptCut, locate_runs

Call = Mapping[str, Any]
"""The arguments of a call of ``forward()`` or ``generate()`` by name; names are ours where :attr:`Family.names` says
so."""
Reason = tuple[str, str]
"""(why a call cannot be compressed, what to do about it), both without a full stop."""
Generation = Literal["transformers", "embeddings", "forward"]
"""How a model generates; see :attr:`Family.generation`."""


@dataclass(frozen=True)
class Video:
    """One video of a call, ready to be traced."""

    pixels: Tensor
    """[F, ...]: frames come first."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What else :meth:`Family.rows` takes of this call, by name. Code is compiled for each of the values; tensors among
    them are ``[F, ...]`` as the pixels are, and reach :meth:`Family.rows` as ``[1, F, ...]``."""
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    """What is the same for all frames, such as the positions of their patches: tensors of any shape that
    :meth:`Family.rows` gets by name, as they are. Code is compiled for their shapes, not for what is in them."""
    size: str = ""
    """Of a frame, for people, where that is not the last two axes of ``pixels``: ``"16x28 patches"``."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with the rows of its videos in it, as the model's own method made it."""

    returned: Any
    """What that method returns."""
    length: int
    """S', its positions."""
    mask: Tensor | None
    """Attention mask [R, S']; None where no position is padded."""


class Family:
    """What the rest of the package may know of a model. Has no state: one object serves all models of its classes.

    A family must say ``name``, ``classes``, :meth:`rows`, and :meth:`frame_shape` or :meth:`videos`; the rest where its
    model does otherwise than the default says.
    """

    name: str
    """For people: ``"LLaVA-OneVision"``."""
    classes: tuple[str, ...]
    """The model classes it serves, by qualified name (``"package.module.Class"``), subclasses included. Nothing is
    imported for them. A ``*`` stands for what differs between installations, such as the commit in the modules of
    ``trust_remote_code``: ``"transformers_modules.*.modeling_mine.Mine"``."""
    requires: Mapping[str, str] = {}
    """The versions of each package that work: ``{"transformers": ">=5.17"}``, as pip takes them."""
    names: Mapping[str, str] = {}
    """Ours -> the model's, for arguments of ``forward()`` and ``generate()`` that it calls otherwise than transformers:
    ``input_ids``, ``pixel_values_videos``, ``inputs_embeds``, ``attention_mask``, ``position_ids``, ``labels``."""
    keeps_places: bool = False
    """Whether a row that stays of a video takes its own place in the prompt, and so its own position, that of a merged
    frame in the first of its frames: for models that know by its position where and when a token is. Else the rows
    stand in the first places of their video, as if there had been no others."""
    consumed: frozenset[str] = frozenset()
    """Arguments that a call has no use for once its videos are rows, besides pixels and ids."""
    generation: Generation | None = None
    """What ``generate()`` of the model is; None finds it out.

    ``"transformers"``: that of ``GenerationMixin``, which takes embeddings, or one that hands its arguments on to it.
    ``max_length`` counts the prompt, and streamers, criteria and processors see it. Found where the class has it.
    ``"embeddings"``: one of its own that takes ``inputs_embeds`` beside the ids; nothing else of its arguments is
    changed. Found where its signature names them: ``**kwargs`` alone says nothing.
    ``"forward"``: left alone; each of its calls of ``forward()`` with a video compresses. Right only for a loop that
    calls with all ids each time and has no cache, mask or positions, which would have the uncut length.

    Calls with videos of any other run uncompressed, with the reason. Of the first two the ids go by the name they have
    in :attr:`names` where the signature has it, or else as the first argument. What is returned has the caller's ids
    back in front where it is a tensor [R, S'] (or has one as ``.sequences``) that begins with the cut prompt; anything
    else is handed through.
    """
    prompt_method: str | None = None
    """The method of the model that puts rows into its prompt, where it has one that ``forward()`` and ``generate()``
    call. Both get the caller's arguments then, and the method returns what :meth:`prompt` has made. None means that
    the prompt is cut here, with :meth:`places` and :meth:`inputs`."""
    model_type: str | None = None
    """``model_type`` in the config.json of its checkpoints, if the command line can load them."""
    checkpoint: str = ""
    """One of them on the Hub, as an example for people."""

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of :class:`EarlyTomConfig` that the caller gave, and the defaults that are others with this model."""
        return dict(given)

    # --- The model ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What Dynamo needs to trace :meth:`rows` in one graph, done before it first does; may be called again."""

    def vision_tower(self, model: Any) -> nn.Module:
        """The module whose layers encode the frames."""
        return model.model.vision_tower

    def language_model(self, model: Any) -> nn.Module | None:
        """The decoder, called with ``inputs_embeds``: its pass over a prompt is compiled too. None leaves it alone."""
        return None

    def vision_within(self, model: Any) -> Sequence[nn.Module]:
        """Modules of the video path that lie in :meth:`language_model`, where any do."""
        return ()

    def embedding(self, model: Any) -> nn.Module:
        """The token embedding, int64 [R, S] -> [R, S, C]."""
        return model.get_input_embeddings()

    def encoder_layers(self, config: Any) -> int | None:
        """Layers of the vision encoder whose output counts, as ``model.config`` tells, so that ``merge_layers`` can be
        checked at once; None where it does not."""
        return None

    # --- The videos of a call -------------------------------------------------------------------------

    def frame_shape(self, model: Any) -> tuple[int, ...] | None:
        """The shape of one frame of ``pixel_values_videos``, such as (3, 384, 384); None where several will do."""
        return None

    def videos(self, model: Any, call: Call) -> list[Video]:
        """The videos of a call, in the order of their placeholders; here those of a tensor [V, F, ...], or of a list of
        [F, ...]. Raises :class:`EarlyTomConfigError` for what the model cannot take."""
        videos = call["pixel_values_videos"]
        expected = self.frame_shape(model)
        for video in videos:
            wrong = expected is not None and tuple(video.shape[1:]) != expected
            if wrong or video.dim() < 2 or len(video) == 0:
                raise EarlyTomConfigError(self._wrong_shape(videos, expected))
        return [Video(video) for video in videos]

    def blank_call(self, model: Any, frames: int, frame_size: tuple[int, int] | None = None) -> Call:
        """What a processor makes of a video of so many pictures, on the model's device and in its dtype, for code that
        is compiled before there is a video; ``frame_size`` (height, width) where a model takes several. Raises
        :class:`EarlyTomConfigError` for a size that it does not take."""
        shape = self.frame_shape(model)
        if shape is None or frame_size not in (None, shape[1:]):
            takes = "its processor knows" if shape is None else f"it takes {shape[1]}x{shape[2]}"
            given = "" if frame_size is None else f" as {frame_size[0]}x{frame_size[1]}"
            raise EarlyTomConfigError(f"a blank video{given} for {self.name}: {takes}.")
        weights = next(self.vision_tower(model).parameters())
        return {"pixel_values_videos": weights.new_zeros((1, frames, *shape))}

    def token_grid(self, model: Any, video: Video) -> tuple[int, int] | None:
        """Rows and columns of the tokens of a frame, for pictures of what was kept; None where what the encoder's graph
        does to the patches tells it."""
        return None

    def spelled(self, name: str) -> str:
        """What the model calls an argument, by our name for it."""
        return self.names.get(name, name)

    def by_our_names(self, arguments: Call) -> dict[str, Any]:
        """Arguments as the model takes them -> a call as the methods here take it."""
        ours = {theirs: name for name, theirs in self.names.items()}
        return {ours.get(name, name): value for name, value in arguments.items()}

    def by_its_own_names(self, call: Call) -> dict[str, Any]:
        """The way back."""
        return {self.spelled(name): value for name, value in call.items()}

    def _wrong_shape(self, videos: Any, expected: tuple[int, ...] | None) -> str:
        name = self.spelled("pixel_values_videos")
        shape = tuple(videos.shape) if isinstance(videos, Tensor) else [tuple(video.shape) for video in videos]
        takes = "" if expected is None else f", and this model's vision tower takes {expected} for each frame"
        return (
            f"{name} have shape {shape}; they must be [videos, frames, channels, height, width], or a list of "
            f"[frames, channels, height, width], with at least one frame each{takes}. Prepare videos with the model's "
            "processor."
        )

    def rows(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Rows [N, C] or [1, N, C] of one video, [1, F, ...], as the language model gets them, separators included.

        Traced: the model's own code, with nothing in it that asks for a value of a tensor. The frames must be one axis
        of their own through the whole encoder, up to the place where they and their tokens become one axis.
        """
        raise NotImplementedError

    def row_width(self, model: Any) -> int:
        """Channels of a row; more than an embedding has where rows bring more than that."""
        return int(self.embedding(model).embedding_dim)  # type: ignore[arg-type]

    def separators(self, model: Any, kept: Tensor) -> Tensor | None:
        """Behind which rows of a video the model has one of its own, such as a newline: int64 [M], ascending places in
        the K; ``kept``, int64 [K, 2], ascending, has the (merged frame, token of its grid) of each row. For separators
        that are not in what :meth:`rows` returns, since where they go depends on what is kept. None if there are none.
        """
        return None

    def separator(self, model: Any) -> Tensor:
        """That row, [C]."""
        raise NotImplementedError

    def other_rows(self, model: Any, ids: Tensor, call: Call) -> Iterable[tuple[int, Tensor]]:
        """(placeholder token, rows [N, C]) of what else is put into the prompt, such as images. Never compressed."""
        return ()

    # --- The prompt -----------------------------------------------------------------------------------

    def video_token(self, model: Any) -> int:
        """The id in ``input_ids`` that holds the place of a video's row."""
        return model.config.video_token_id

    def places(self, model: Any, ids: Tensor, sizes: Sequence[int]) -> Places:
        """Where the videos are in ``ids``, int64 [R, S] on the host; ``sizes[v]`` is how many rows video v has
        uncompressed. Here as many placeholders, next to each other; of a video whose frames have text between them,
        :func:`~earlytom_compile.prompt.locate_pieces` finds them.

        Raises :class:`EarlyTomConfigError` for a prompt that does not match, and
        :class:`~earlytom_compile.prompt.UncuttablePrompt` for one that does and cannot be cut.
        """
        return locate_runs(ids, self.video_token(model), sizes)

    def inputs(self, model: Any, ids: Tensor, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        """The arguments that bring ``rows``, (placeholder token, [N, C]) each, to the language model in the places of
        the cut prompt ``ids`` [R, S']; here embeddings [R, S', C]. ``generate()`` gets the ids in any case, and
        ``forward()`` if they are among these."""
        embeds = self.embedding(model)(ids)
        for token, each in rows:
            each = each.to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter((ids == token).unsqueeze(-1).to(embeds.device), each)
        return {"inputs_embeds": embeds}

    def prompt(
        self, model: Any, ids: Tensor, call: Call, rows: Sequence[Tensor], others: Sequence[tuple[int, Tensor]]
    ) -> Prompt:
        """What :attr:`prompt_method` makes of ``ids`` [R, S] and the ``rows`` [K, C] of each video; ``others`` is what
        :meth:`other_rows` gave."""
        raise NotImplementedError

    def prompt_length(
        self, model: Any, ids: Tensor, call: Call, sizes: Sequence[int], others: Sequence[tuple[int, Tensor]]
    ) -> int:
        """How many positions that prompt has if video v has ``sizes[v]`` rows."""
        raise NotImplementedError

    def prompt_videos(
        self, model: Any, ids: Tensor, call: Call, sizes: Sequence[int], others: Sequence[tuple[int, Tensor]]
    ) -> Tensor:
        """Where they are in it: int64 [R, S'], on the host, the video of its row that each position belongs to,
        numbered from 0; -1 for none. Asked where tokens go inside the language model."""
        raise NotImplementedError

    def position_ids(self, model: Any, call: Call, cut: PromptCut) -> Tensor | None:
        """Position ids of the cut prompt; None leaves it to the model to count. Here the caller's, gaps closed."""
        given = call.get("position_ids")
        return None if given is None else cut.renumber(given)

    # --- What does not work ---------------------------------------------------------------------------

    def encoded_before(self, call: Call) -> bool:
        """Whether the call brings features of its videos in place of pixels, which reach the language model as they
        are; here as ``mm_encoder_outputs``."""
        return features_of(call).get("video") is not None

    def refused_by_model(self, call: Call, *, forward: bool) -> bool:
        """Whether the model's own code raises an error of its own for this call, which it is left to do; here for
        pixels together with features."""
        if forward:
            return call.get("mm_encoder_outputs") is not None
        given = {"image": call.get("pixel_values"), "video": call.get("pixel_values_videos")}
        return any(features_of(call).get(kind) is not None and pixels is not None for kind, pixels in given.items())

    def reason_against(self, model: Any, call: Call) -> Reason | None:
        """(reason, cure) for a call with videos that must run uncompressed; None where none is known."""
        return None

    # --- Its checkpoints, for the command line --------------------------------------------------------

    def model_class(self) -> Any:
        """The class that loads a checkpoint: the first of :attr:`classes`, imported now."""
        module, _, name = self.classes[0].rpartition(".")
        return getattr(importlib.import_module(module), name)

    def processor(self, checkpoint: str) -> Any:
        """What stands in for transformers' own processor where torchvision is missing."""
        raise EarlyTomConfigError(f"the processor of {self.name} needs torchvision: pip install torchvision.")

    # --- Versions -------------------------------------------------------------------------------------

    def require_versions(self) -> None:
        """Raise :class:`EarlyTomConfigError` where a package has a version that :attr:`requires` does not allow."""
        for package, allowed in self.requires.items():
            installed, specifier = _version_of(package), self._specifier(package, allowed)
            if installed is None or not specifier.contains(Version(installed), prereleases=True):
                raise EarlyTomConfigError(
                    f"{self.name} needs {package} {allowed}, but {installed or 'none'} is installed: "
                    f"pip install '{package}{allowed}'."
                )

    def _specifier(self, package: str, allowed: str) -> SpecifierSet:
        try:
            return SpecifierSet(allowed)
        except InvalidSpecifier as error:
            raise EarlyTomConfigError(
                f"the family {self.name} has {allowed!r} for {package} in `requires`; must be as pip takes it, such as "
                "'>=5.17' or '>=4.46,<4.56'."
            ) from error


def features_of(call: Call) -> dict[str, Any]:
    """What the caller encoded before the call, by ``"image"`` and ``"video"``."""
    return call.get("mm_encoder_outputs") or {}


def _version_of(package: str) -> str | None:
    """Of what is imported, or else of what would be."""
    if package in sys.modules:
        return getattr(sys.modules[package], "__version__", None)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
