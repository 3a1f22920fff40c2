"""Calls of LLaVA's own code, for the real model and for one written by hand: prompts, videos, pictures, layouts.

call = Call.of(model, [["text", "video", "text", "image"], ["video"]])
model(**call.arguments())                      # forward(); generate() takes the ids first
compressed_prompt(model, **call.oracle(), retain_ratio=0.2, variant="paper")
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from generating import share_vision_paths
from oracle import Options
from oracle_llava import (
    PLACEHOLDER,
    LlavaPrompt,
    compressed_logits,
    compressed_loss,
    compressed_prompt,
    compressed_steps,
    compressed_video,
    grid_side,
)
from scenes import standing_camera, video
from torch import Tensor

import earlytom_compile

OPTIONS: dict[str, Any] = {
    "variant": "paper",
    "merge_layers": (0, 2),
    "reuse": False,
    "tau_seg": 0.3,
    "retain_ratio": 0.2,
}
VARIANTS = ("paper", "released", "plus")
WAYS_TO_REUSE: dict[str, dict[str, Any]] = {
    "plus": {"variant": "plus", "reuse": None, "merge_layers": None},
    "paper and reuse": {"variant": "paper", "reuse": True},
    "released and reuse": {"variant": "released", "reuse": True},
}
"""What to say instead of :data:`OPTIONS` where unchanged patches are reused."""
NEWLINES = ("one_token", "no_token", "frame", "grid")
POOLS = ("average", "bilinear", "max")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLOSE_LOGITS = {"atol": 1e-4, "rtol": 1e-4}
"""Logits of these models are as large as 10, and have gone through the language model too."""
PAD = 0


def shared(model, one_trace, monkeypatch) -> Iterator[Any]:
    """For a fixture: ``model`` for one test, whose calls share a trace; restored behind it, configuration included."""
    share_vision_paths(one_trace, monkeypatch)
    config = dict(model.config.__dict__)
    yield model
    earlytom_compile.restore(model)
    model.config.__dict__.clear()
    model.config.__dict__.update(config)


def side_of(model) -> int:
    """Pixels of a frame, to a side."""
    return model.get_vision_tower().image_size


def clip(model, frames: int = 6, *, scenes: int = 2, changing: float | None = None, seed: int = 1) -> Tensor:
    """``[F, 3, H, W]`` in the dtype of the model, some of whose frames are alike; with ``changing``, the camera stands
    and this share of the patches changes from frame to frame."""
    side, generator = side_of(model), torch.Generator().manual_seed(seed)
    if changing is None:
        pixels = video(frames, side, scenes=scenes, generator=generator)
    else:
        patch = model.get_vision_tower().config.patch_size
        pixels = standing_camera(frames, side, patch=patch, changing=changing, generator=generator)
    return pixels.to(model.dtype)


def picture(model, *, crops: int = 0, seed: int = 1) -> Tensor:
    """``[3, H, W]``, or ``[1 + crops, 3, H, W]`` of a picture with an overview."""
    shape = (1 + crops,) * bool(crops) + (3, side_of(model), side_of(model))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def words(count: int, seed: int) -> list[int]:
    """Ids of text."""
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Call:
    """One call with images. ``ids [R, S]``; a mask where rows are padded."""

    ids: Tensor
    images: Any
    modalities: Any
    image_sizes: Any = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None

    @staticmethod
    def of(
        model,
        rows: Sequence[Sequence[str]],
        *,
        frames: int | Sequence[int] = 6,
        changing: float | None = None,
        left: bool = False,
        seed: int = 1,
    ) -> "Call":
        """Rows of ``"text"`` (3 words), ``"video"``, ``"image"`` and ``"crops"`` (two, above one another); shorter
        rows are padded, and a mask given, where there are several. ``changing``: as in :func:`clip`."""
        ids, images, modalities, sizes, side = [], [], [], [], side_of(model)
        lengths = iter([frames] * 99 if isinstance(frames, int) else frames)
        for row in rows:
            ids.append([])
            for part in row:
                seed += 1
                if part == "text":
                    ids[-1] += words(3, seed)
                    continue
                ids[-1].append(PLACEHOLDER)
                modalities.append("video" if part == "video" else "image")
                sizes.append((side, 2 * side if part == "crops" else side))
                if part == "video":
                    images.append(clip(model, next(lengths), changing=changing, seed=seed))
                else:
                    images.append(picture(model, crops=2 if part == "crops" else 0, seed=seed))
        longest = max(map(len, ids))
        gaps = [[PAD] * (longest - len(row)) for row in ids]
        padded = [gap + row if left else row + gap for gap, row in zip(gaps, ids, strict=True)]
        seen = [[1] * len(row) for row in ids]
        zeros = [[0] * len(gap) for gap in gaps]
        mask = [gap + row if left else row + gap for gap, row in zip(zeros, seen, strict=True)]
        given = torch.tensor(mask) if len(rows) > 1 else None
        # llava keeps as many rows as it gets modalities.
        modalities += ["image"] * (len(rows) - len(modalities))
        return Call(torch.tensor(padded), images, modalities, sizes, given)

    def but(self, **changes: Any) -> "Call":
        """The same with something else in it."""
        return replace(self, **changes)

    def arguments(self) -> dict[str, Any]:
        """Those of ``generate()`` behind the ids."""
        named = {"images": self.images, "modalities": self.modalities, "image_sizes": self.image_sizes}
        named |= {"attention_mask": self.attention_mask}
        return {name: value for name, value in named.items() if value is not None}

    def forward(self) -> dict[str, Any]:
        """Those of ``forward()``."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"input_ids": self.ids, **self.arguments(), **labels}

    def oracle(self) -> dict[str, Any]:
        """Those of ``compressed_prompt()`` behind the model."""
        return {"ids": self.ids, "labels": self.labels, **self.arguments()}


# --- Against the oracle ---------------------------------------------------------------------------


def compiled(model, **options):
    """In place, with nothing lowered, and no call that may run uncompressed."""
    return earlytom_compile.compile(model, **{"lowering": "eager", "strict": True, **OPTIONS, **options})


def options_of_oracle(options: dict[str, Any]) -> dict[str, Any]:
    """Those that change what is computed."""
    known = {each.name for each in fields(Options)}
    return {"variant": "paper", **OPTIONS, **{name: value for name, value in options.items() if name in known}}


def expected(model, call: Call, **options) -> LlavaPrompt:
    """What the oracle makes of a call, for a model that is not compiled."""
    earlytom_compile.restore(model)
    return compressed_prompt(model, **call.oracle(), **options_of_oracle(options))


def check_rows(model, pixels: Tensor, **options) -> None:
    """``encode_videos`` gives the rows of the oracle, and says how many there were."""
    earlytom_compile.restore(model)
    oracle = compressed_video(model, pixels, **options_of_oracle(options))
    (rows,) = earlytom_compile.encode_videos(compiled(model, **options), [pixels])
    torch.testing.assert_close(rows, oracle.rows, **CLOSE)
    (told,) = earlytom_compile.report(model).to_dict()["videos"]
    assert told["frames"] == [len(pixels), *oracle.frames_after]
    assert told["tokens"] == [len(pixels) * grid_side(model) ** 2, len(oracle.kept)]


def check_forward(model, call: Call, **options) -> None:
    """Logits are those of the oracle, wherever a row has a token; and the loss, where there are labels."""
    prompt = expected(model, call, **options)
    logits = compressed_logits(model, prompt)
    with torch.no_grad():
        output = compiled(model, **options)(**call.forward())
    assert output.logits.shape == logits.shape
    seen = torch.ones(logits.shape[:2], dtype=torch.bool) if prompt.mask is None else prompt.mask.bool()
    torch.testing.assert_close(output.logits[seen], logits[seen], **CLOSE_LOGITS)
    if call.labels is not None:
        torch.testing.assert_close(output.loss, compressed_loss(earlytom_compile.restore(model), prompt), **CLOSE)


def generated(model, call: Call, new: int | None = 4, **kwargs) -> Tensor:
    """What ``generate()`` of the model returns."""
    return model.generate(
        call.ids, **call.arguments(), **{"max_new_tokens": new, "do_sample": False, "pad_token_id": PAD, **kwargs}
    )


def check_generate(model, call: Call, new: int = 4, oracle: dict[str, Any] | None = None, **options) -> None:
    """The new tokens, and nothing but them, are those of the oracle, and so are their logits. ``oracle``: options that
    it alone has."""
    oracle = oracle or {}
    prompt = expected(model, call, **options, **oracle)
    tokens, logits = compressed_steps(model, prompt, new, oracle.get("steps", ()))
    output = generated(compiled(model, **options), call, new, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, tokens)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, **CLOSE_LOGITS)
    assert torch.equal(generated(model, call, new), tokens)
    assert earlytom_compile.report(model).to_dict()["last_call"] == "compressed"
