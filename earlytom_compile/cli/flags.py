"""Flags that several commands have.

add_json(parser, "every number")         # --json FILE
"""

import argparse
from collections.abc import Callable
from typing import Any

from .parser import CommandParser


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """``"8,16"`` -> (8, 16), for argparse."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            example = "8,16" if kind is int else "0.1,0.2"
            raise argparse.ArgumentTypeError(f"{text!r}: must be numbers with commas between, as {example}.") from error

    return read


def picture_size(text: str) -> tuple[int, int]:
    """``"168x280"`` -> (168, 280), for argparse."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be height x width in pixels, as 168x280.")
    return int(height), int(width)


def add_frame_size(parser: CommandParser) -> None:
    """Of models that take any."""
    parser.add_rare(
        "--frame-size",
        type=picture_size,
        metavar="HxW",
        help="height and width in pixels of a picture as a model of Qwen gets it (default: the shape's, 16:9)",
    )


def add_model(parser: CommandParser, *, required: bool, fallback: str = " (default: the demo's)") -> None:
    """The checkpoint, and where its model is going to be."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="PATH_OR_HUB_ID",
        help="a checkpoint of LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL or Qwen3.5, or of a family that an installed "
        f"package registers: a folder, or a name on the Hugging Face Hub{fallback}",
    )
    add_device(parser)
    add_dtype(parser)


def add_dtype(parser: CommandParser) -> None:
    """That of the weights."""
    parser.add_rare(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="of the weights; auto = the checkpoint's own on a GPU, float32 on a CPU",
    )


def add_device(parser: CommandParser) -> None:
    """Where everything is computed."""
    parser.add_rare("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")


def add_json(parser: CommandParser, what: str, *, alone: bool = False) -> None:
    """``alone``: without a file, the flag means the standard output."""
    settings: dict[str, Any] = {"nargs": "?", "const": "-"} if alone else {}
    text = f"write {what} there; -: to the standard output, and nothing else"
    parser.add_argument("--json", metavar="FILE", help=text, **settings)


def add_resume(parser: CommandParser, what: str) -> None:
    """Going on with what ``--json`` has; ``what`` says of it what is done."""
    parser.add_argument("--resume", action="store_true", help=f"go on where Ctrl-C stopped: {what}")


def add_documents(parser: CommandParser, what: str) -> None:
    """Results for people."""
    parser.add_rare("--markdown", metavar="FILE", help=f"write {what} there")
    parser.add_rare("--plot", metavar="DIR", help="write PNG files there (needs matplotlib)")


def add_retain_ratios(parser: CommandParser, default: tuple[float, ...], text: str) -> None:
    """Several of them, a row each."""
    parser.add_argument(
        "--retain-ratios",
        "--retain-ratio",
        type=numbers(float),
        default=default,
        metavar="R,R",
        help=f"{text} ({','.join(map(str, default))})",
    )


def add_frames(parser: CommandParser) -> None:
    """How many of each video."""
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="pictures taken evenly from the video (default: what the checkpoint was made for, else 32, or as many as "
        "the file has)",
    )


def add_max_new_tokens(parser: CommandParser, default: int) -> None:
    """Where an answer ends."""
    text = "length limit of the answer (%(default)s)"
    parser.add_rare("--max-new-tokens", type=int, default=default, metavar="N", help=text)


def add_pictures(parser: CommandParser) -> None:
    """What became of a video."""
    text = "draw there which frames merged and which tokens stayed"
    parser.add_argument("--html", metavar="FILE", help=f"{text}: one page that needs nothing else")
    parser.add_argument("--png", metavar="FILE", help="the same as one image (needs matplotlib)")


def add_repeats(parser: CommandParser, text: str = "timed runs of each model (%(default)s)", default: int = 5) -> None:
    """How often something is timed."""
    parser.add_rare("--repeats", type=int, default=default, metavar="N", help=text)
