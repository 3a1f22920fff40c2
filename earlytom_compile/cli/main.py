"""The ``earlytom`` command: ``demo``, ``run``, ``explain``, ``compare``, ``bench``, ``flops`` and ``eval``.

Only the parser lives here. What a command needs (torch, transformers) is imported when it runs, so that
``earlytom --help`` answers at once.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..config import EarlyTomConfig
from ..errors import EarlyTomError
from .options import add_config_flags, given_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for a mistake in what was asked, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        options = given_options(arguments)
        command = importlib.import_module(f".{arguments.command}", __package__)
        command.execute(arguments, options)
    except EarlyTomError as error:
        print(f"earlytom {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="earlytom", description="Video-LLMs that compress their video tokens inside the vision encoder."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="compare full and compressed answers, with what comes along"))
    _add_run(commands.add_parser("run", help="ask a LLaVA-OneVision checkpoint about a video"))
    _add_explain(commands.add_parser("explain", help="show what the compiler does to a checkpoint"))
    _add_compare(commands.add_parser("compare", help="measure what fewer tokens cost, on questions of your own"))
    _add_bench(commands.add_parser("bench", help="time all tokens against fewer, side by side"))
    _add_flops(commands.add_parser("flops", help="count the work of a prefill, full and compressed"))
    _add_eval(commands.add_parser("eval", help="count right answers, with all tokens and with fewer"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws a short video, asks questions with the full and with the compressed model, and shows the difference. "
        "The model is a small LLaVA-OneVision that was trained on such videos and comes along."
    )
    parser.add_argument("--save", metavar="FOLDER", help="keep checkpoint and video there (default: thrown away)")
    _add_frames(parser, 8)
    _add_max_new_tokens(parser, 16)
    _add_repeats(parser)
    add_config_flags(parser, retain_ratio=0.1)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = "Asks a LLaVA-OneVision checkpoint about a video, with compressed video tokens."
    _add_model(parser, required=True, fallback="")
    parser.add_argument("--video", required=True, metavar="FILE", help="any video FFmpeg can read")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    _add_frames(parser)
    _add_max_new_tokens(parser, 64)
    parser.add_argument("--compare", action="store_true", help="answer with the full model too, and compare")
    _add_repeats(parser)
    add_config_flags(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes one compressed call and prints what matched, what was inserted, what was left alone and why."
    )
    _add_model(parser, required=False)
    parser.add_argument("--video", metavar="FILE", help="default: a short clip made on the spot")
    _add_frames(parser)
    add_config_flags(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answers questions about videos with all tokens and with fewer, in turn, and says how many answers stay the "
        "same, how much less likely the full model's answers become, what it saves, and which setting to take."
    )
    _add_model(parser, required=True, fallback="")
    parser.add_argument("--videos", required=True, metavar="DIR", help="the folder of the videos")
    parser.add_argument(
        "--questions",
        required=True,
        metavar="FILE",
        help="CSV with the header video,question or video,question,answer, or JSON lines with these names",
    )
    _add_retain_ratios(parser, (0.25, 0.1), "shares of the video tokens")
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        default=("paper", "plus"),
        metavar="NAME,NAME",
        help="each with every ratio (paper,plus)",
    )
    _add_frames(parser)
    _add_max_new_tokens(parser, 32)
    parser.add_argument("--json", metavar="FILE", help="write every answer and number there, question by question")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has of a stopped run")
    add_config_flags(parser, leave_out=("retain_ratio", "variant"), lowering="eager")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times the way to the first token and decoding behind it: transformers, Inductor, EarlyTom in both "
        "spellings, and fewer frames in two trivial ways, all in turn in one process; then one call of each under a "
        "profiler, for where the time goes. The video is synthetic; how far its frames merge is printed beside every "
        "row."
    )
    _add_model(parser, required=False, fallback="")
    parser.add_argument(
        "--shape", default="cpu-small", metavar="NAME", help="random weights in this shape (%(default)s)"
    )
    parser.add_argument("--frames", type=_numbers(int), metavar="N,N", help="one table each (default: the shape's)")
    parser.add_argument("--batch", type=int, default=1, help="prompts, one video each (%(default)s)")
    parser.add_argument("--prompt-length", type=int, default=32, help="words beside the video (%(default)s)")
    _add_retain_ratios(parser, (0.1,), "EarlyTom's")
    parser.add_argument(
        "--arms",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,NAME",
        help="measure only arms whose names begin so, such as transformers,earlytom (default: all)",
    )
    parser.add_argument(
        "--scene-frames", type=int, default=4, metavar="N", help="frames of a scene; 4 alike merge to 3 (%(default)s)"
    )
    parser.add_argument(
        "--redundancy",
        type=float,
        default=1.0,
        help="share of a frame that is its scene; 1: scenes stand still; less noise is not always more merging "
        "(%(default)s)",
    )
    parser.add_argument("--decode-tokens", type=int, default=8, help="tokens decoded behind the first (%(default)s)")
    _add_repeats(parser)
    parser.add_argument(
        "--concurrency", type=_numbers(int), metavar="C,C", help="measure load instead: so many clients, one table each"
    )
    parser.add_argument("--max-batch", type=int, default=8, help="most requests of a call under load (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every single number there")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there")
    parser.add_argument("--plot", metavar="DIR", help="write PNG files there (needs matplotlib)")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of one call of every arm there")
    add_config_flags(parser, leave_out=("retain_ratio",))


def _add_flops(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Counts what a prefill costs with all tokens, with EarlyTom and with other methods, the way the paper counts "
        "or the way torch does. Nothing is run."
    )
    parser.add_argument("--shape", default="llava-onevision-7b", metavar="NAME", help="a named shape (%(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="the shape in this checkpoint's config.json instead")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of the video (default: the shape's usual)")
    _add_retain_ratios(parser, (0.25, 0.2, 0.15, 0.1), "shares of the video tokens that reach the language model")
    parser.add_argument("--protocol", choices=("paper", "exact"), default="paper", help="how to count (%(default)s)")
    parser.add_argument(
        "--merge-layers", type=_numbers(int), metavar="I,I", help="encoder layers after which frames merge"
    )
    parser.add_argument(
        "--schedule", type=_numbers(float), metavar="N,N", help="frames at first and after each merge (73.9%% stay)"
    )
    parser.add_argument("--prompt-length", type=int, default=32, help="words beside the video, if exact (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every number there")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Asks a small model, trained for it, about synthetic videos: with all tokens, with EarlyTom, with parts of it "
        "and with trivial ways to fewer tokens, and counts right answers by category."
    )
    parser.add_argument("--toy", action="store_true", help="the toy world of examples/toyworld (the only one so far)")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint trained on it (default: the one here)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--split", default="test", choices=("validation", "test"), help="of the videos (%(default)s)"
    )
    parser.add_argument("--videos", type=int, default=1000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one (%(default)s)")
    _add_retain_ratios(parser, (0.25, 0.2, 0.15, 0.1), "shares of the video tokens")
    parser.add_argument("--json", metavar="FILE", help="write every number there")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    parser.add_argument("--plot", metavar="DIR", help="write PNG files there (needs matplotlib)")
    algorithm = ("merge_layers", "tau_seg", "alpha", "max_window", "tau_merge")
    names = [field.name for field in dataclasses.fields(EarlyTomConfig)]
    add_config_flags(parser, leave_out=[name for name in names if name not in algorithm])


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """``"8,16"`` -> (8, 16), for argparse."""

    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            example = "8,16" if kind is int else "0.1,0.2"
            raise argparse.ArgumentTypeError(f"{text!r}: must be numbers with commas between, as {example}.") from error

    return numbers


def _add_model(
    parser: argparse.ArgumentParser, *, required: bool, fallback: str = " (default: the demo's)"
) -> None:
    parser.add_argument(
        "--model",
        required=required,
        metavar="PATH_OR_HUB_ID",
        help=f"a LLaVA-OneVision checkpoint: a folder, or a name on the Hugging Face Hub{fallback}",
    )
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="of the weights; auto = the checkpoint's own on a GPU, float32 on a CPU",
    )


def _add_retain_ratios(parser: argparse.ArgumentParser, default: tuple[float, ...], text: str) -> None:
    parser.add_argument(
        "--retain-ratios",
        "--retain-ratio",
        type=_numbers(float),
        default=default,
        metavar="R,R",
        help=f"{text} ({','.join(map(str, default))})",
    )


def _add_frames(parser: argparse.ArgumentParser, default: int = 32) -> None:
    parser.add_argument("--frames", type=int, default=default, help="frames taken evenly from the video (%(default)s)")


def _add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    text = "length limit of the answer (%(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=default, help=text)


def _add_repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each model (%(default)s)")


if __name__ == "__main__":
    sys.exit(main())
