"""Pixels as files inside a page: ``data:`` URIs, by FFmpeg's encoders, which are there wherever videos are read."""

import base64
import math
from fractions import Fraction
from typing import cast

import av
import numpy as np

_JPEG_QUALITY = 3  # FFmpeg's scale from 2, the best, to 31
_BYTES = 1_500_000
"""About what all frames of a page together may take, before base64."""
_BYTES_PER_PIXEL = 0.5  # of a JPEG of this quality
_LARGEST, _SMALLEST = 264, 96


def longest_side(frames: int) -> int:
    """In pixels, of each of so many frames, so that a page stays small."""
    return int(min(max(math.sqrt(_BYTES / max(frames, 1) / _BYTES_PER_PIXEL), _SMALLEST), _LARGEST))


def photo(pixels: np.ndarray, width_by_height: float, longest: int) -> str:
    """uint8 [H, W, 3] -> JPEG or PNG, whichever is smaller, of that shape and at most ``longest`` pixels a side."""
    longest = min(longest, max(pixels.shape[:2]))
    width = longest if width_by_height >= 1 else longest * width_by_height
    size = max(1, round(width)), max(1, round(width / width_by_height))
    jpeg, png = _encode(pixels, "mjpeg", "yuvj444p", size), _encode(pixels, "png", "rgb24", size)
    return _uri("jpeg", jpeg) if len(jpeg) < len(png) else _uri("png", png)


def exact(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] -> PNG, pixel by pixel."""
    return _uri("png", _encode(pixels, "png", "rgb24", (pixels.shape[1], pixels.shape[0])))


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(pixels: np.ndarray, codec: str, pixel_format: str, size: tuple[int, int]) -> bytes:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(
        width=size[0],
        height=size[1],
        format=pixel_format,
        interpolation="AREA",
        dst_color_range="JPEG" if codec == "mjpeg" else None,
    )
    encoder = cast(av.VideoCodecContext, av.CodecContext.create(codec, "w"))
    encoder.width, encoder.height = size
    encoder.pix_fmt, encoder.time_base = pixel_format, Fraction(1, 1)
    if codec == "mjpeg":
        encoder.qmin = encoder.qmax = _JPEG_QUALITY
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
