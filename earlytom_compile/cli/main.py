"""The ``earlytom`` command: ``demo``, ``run``, ``explain``, ``compare``, ``bench``, ``flops``, ``export`` and ``eval``.

Only the parser lives here. What a command needs (torch, transformers) is imported when it runs, so that
``earlytom --help`` answers at once.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..config import NOT_EXPORTED
from ..errors import EarlyTomError
from .eval_flags import add_eval
from .flags import (
    add_documents,
    add_frame_size,
    add_frames,
    add_json,
    add_max_new_tokens,
    add_model,
    add_pictures,
    add_repeats,
    add_resume,
    add_retain_ratios,
    numbers,
)
from .options import add_config_flags, given_options
from .parser import CommandParser
from .printing import Unwritten, checked_output, discard_output

_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended
# What torch's profiler says about itself; both are read when torch is imported, and what somebody set stays.
_QUIET_PROFILER = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# What a machine with CUDA's compiler and without a GPU is told while something else is compiled.
_NO_GPU = "torch.utils.cpp_extension", "No CUDA runtime is found"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for a mistake in what was asked or output that is lost, 130 after Ctrl-C."""
    try:
        with checked_output():
            return _run(argv)
    except BrokenPipeError:  # nobody reads any more, as in `earlytom flops | head`
        discard_output()
        return _BROKEN_PIPE
    except Unwritten as lost:
        discard_output()
        print(f"earlytom: the standard output cannot be written ({lost}).", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        options = given_options(arguments)
        with _plain_warnings(arguments.command), _without_line(*_NO_GPU):
            _command(arguments).execute(arguments, options)
    except EarlyTomError as error:
        print(f"earlytom {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        said = f": {stopped}" if str(stopped) else "."
        print(f"\nearlytom {arguments.command}: stopped{said}", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Our own warnings are for people: without the place in the code, as errors are."""
    usual = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], *place: Any) -> str:
        ours = category.__module__ == EarlyTomError.__module__
        return f"earlytom {command}: warning: {message}\n" if ours else usual(message, category, *place)

    warnings.formatwarning = formatted  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _without_line(logger: str, beginning: str) -> Iterator[None]:
    """What ``logger`` says that begins so is not said."""

    def others(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logging.getLogger(logger).addFilter(others)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(others)


def _command(arguments: argparse.Namespace) -> Any:
    """The command's module, whose imports take long, once what it is to write to has been tried."""
    from rich.console import Console

    from .outputs import check_outputs
    from .progress import progress_bars

    if arguments.command == "bench":
        for name, value in _QUIET_PROFILER.items():
            os.environ.setdefault(name, value)
    console = Console(stderr=True, quiet=getattr(arguments, "quiet", False))
    with progress_bars(console) as progress:
        progress.add_task("importing torch and transformers", total=None)
        check_outputs(arguments)  # needs neither, nor does this
        _require_videos(arguments)
        return importlib.import_module(f".{arguments.command}", __package__)


def _require_videos(arguments: argparse.Namespace) -> None:
    videos = getattr(arguments, "video", None)
    if videos:
        from ..integrations.addresses import require_file

        for video in [videos] if isinstance(videos, str) else videos:
            if video not in getattr(arguments, "known_videos", ()):
                require_file(video)


def build_parser() -> CommandParser:
    """The whole command line."""
    parser = CommandParser(
        prog="earlytom",
        description="Video-LLMs that compress their video tokens inside the vision encoder.",
        epilog="earlytom COMMAND --help tells more about one of them.",
        chooses=True,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="compare full and compressed answers, with what comes along"))
    _add_run(commands.add_parser("run", help="ask a checkpoint about a video"))
    _add_explain(commands.add_parser("explain", help="show what you gain on a video, and what the compiler does"))
    _add_compare(commands.add_parser("compare", help="measure what fewer tokens cost, on questions of your own"))
    _add_bench(commands.add_parser("bench", help="time all tokens against fewer, side by side"))
    _add_flops(commands.add_parser("flops", help="count the work of a prefill, full and compressed"))
    _add_export(commands.add_parser("export", help="write the video path as a program for processes without this one"))
    add_eval(commands.add_parser("eval", help="measure what compression costs in answers and features"))
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        ours, *others = (f"{name} {_version(name)}" for name in ("earlytom-compile", "torch", "transformers"))
        print(f"{ours} ({', '.join(others)}, Python {platform.python_version()})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_demo(parser: CommandParser) -> None:
    parser.description = (
        "Draws a short video, asks a small model that was trained on such videos about it, with all video tokens and "
        "with a tenth of them; times a larger model with random weights both ways; and draws what happened as a page."
    )
    parser.add_argument("--save", metavar="FOLDER", help="keep checkpoint and video there (default: thrown away)")
    parser.add_argument("--html", metavar="FILE", help="where the page goes (default: a folder for temporary files)")
    parser.add_rare("--frames", type=int, default=8, metavar="N", help="frames taken from the video (%(default)s)")
    add_max_new_tokens(parser, 16)
    add_repeats(parser, default=3)
    add_config_flags(parser, retain_ratio=0.1, lowering="eager")


def _add_run(parser: CommandParser) -> None:
    parser.description = (
        "Asks a checkpoint about a video, with compressed video tokens. With several videos, each is "
        "one of its own; with several questions, each is asked about each video, and none knows of the others."
    )
    add_model(parser, required=True, fallback="")
    parser.add_argument(
        "--video", required=True, action="append", metavar="FILE", help="any video FFmpeg can read; may be repeated"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="the question; may be repeated"
    )
    add_frames(parser)
    parser.add_argument("--compare", action="store_true", help="answer with the full model too, and compare")
    parser.add_argument("--quiet", action="store_true", help="print answers, warnings and errors alone")
    add_json(parser, "answers, tokens, frames, times and options", alone=True)
    add_pictures(parser)
    add_max_new_tokens(parser, 64)
    add_repeats(parser, "timed runs of each model, with --compare (%(default)s)")
    add_config_flags(parser)


def _add_explain(parser: CommandParser) -> None:
    parser.description = (
        "Makes one call with all tokens and one with fewer, and prints what you gain (tokens, work, time, memory), "
        "what both models answer if you ask, what was found in the video, what the words mean, and what the compiler "
        "did, what it left alone and why."
    )
    add_model(parser, required=False)
    parser.add_argument("--video", metavar="FILE", help="default: a short clip made on the spot")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a question that both models answer; may be repeated"
    )
    add_frames(parser)
    add_pictures(parser)
    add_max_new_tokens(parser, 64)
    add_config_flags(parser)


def _add_compare(parser: CommandParser) -> None:
    parser.description = (
        "Answers questions about videos with all tokens and with fewer, in turn, and says how many answers stay the "
        "same, how much less likely the full model's answers become, what it saves, and which setting to take."
    )
    add_model(parser, required=True, fallback="")
    parser.add_argument("--videos", required=True, metavar="DIR", help="the folder of the videos")
    parser.add_argument(
        "--questions",
        required=True,
        metavar="FILE",
        help="CSV with the header video,question or video,question,answer, or JSON lines with these names",
    )
    add_retain_ratios(parser, (0.25, 0.1), "shares of the video tokens")
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        default=("paper", "plus"),
        metavar="NAME,NAME",
        help="each with every ratio (paper,plus)",
    )
    add_frames(parser)
    add_max_new_tokens(parser, 32)
    parser.add_argument("--json", metavar="FILE", help="write every answer and number there, question by question")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has of a stopped run")
    add_config_flags(parser, leave_out=("retain_ratio", "variant"), lowering="eager")


def _add_bench(parser: CommandParser) -> None:
    parser.description = (
        "Times the way to the first token and decoding behind it: transformers, Inductor, EarlyTom in both "
        "spellings, fewer frames in two trivial ways, and the methods of other papers that --arms names, all in turn "
        "in one process; then one call of each under a profiler, for where the time goes. The video is synthetic "
        "unless one is given; how far its frames merge is printed beside every row."
    )
    add_model(parser, required=False, fallback="")
    parser.add_argument(
        "--shape", default="cpu-small", metavar="NAME", help="random weights in this shape (%(default)s)"
    )
    parser.add_argument("--video", metavar="FILE", help="a video, in every row of a batch, instead of a synthetic one")
    parser.add_argument(
        "--frames",
        type=numbers(int),
        metavar="N,N",
        help="pictures of the video, one table each; two are a temporal patch of Qwen (default: the model's, or the "
        "shape's)",
    )
    add_retain_ratios(parser, (0.1,), "EarlyTom's")
    parser.add_argument(
        "--arms",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,NAME",
        help="measure only arms whose names begin so, such as 'transformers,earlytom 0.1,visionzip'; all: every one, "
        "the methods of other papers too (default: all but those)",
    )
    add_json(parser, "every single number, after every round")
    add_resume(parser, "only what --json lacks")
    parser.add_rare("--batch", type=int, default=1, metavar="N", help="prompts, one video each (%(default)s)")
    parser.add_rare("--prompt-length", type=int, default=32, metavar="N", help="words beside the video (%(default)s)")
    parser.add_rare(
        "--scene-frames",
        type=int,
        default=4,
        metavar="N",
        help="frames of a scene, temporal patches of Qwen; 4 alike merge to 3 (%(default)s)",
    )
    add_frame_size(parser)
    parser.add_rare(
        "--redundancy",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of a frame that is its scene; 1: scenes stand still; less noise is not always more merging "
        "(%(default)s)",
    )
    parser.add_rare(
        "--decode-tokens", type=int, default=8, metavar="N", help="tokens decoded behind the first (%(default)s)"
    )
    add_repeats(parser)
    parser.add_rare(
        "--concurrency", type=numbers(int), metavar="C,C", help="measure load instead: so many clients, one table each"
    )
    parser.add_rare(
        "--max-batch", type=int, default=8, metavar="N", help="most requests of a call under load (%(default)s)"
    )
    add_documents(parser, "the tables")
    parser.add_rare("--trace", metavar="FILE", help="write a Chrome trace of one call of every arm there")
    add_config_flags(parser, leave_out=("retain_ratio",))


def _add_flops(parser: CommandParser) -> None:
    parser.description = (
        "Counts what a prefill costs with all tokens, with EarlyTom and with other methods, the way the paper counts "
        "or the way torch does. Nothing is run."
    )
    parser.add_argument("--shape", default="llava-onevision-7b", metavar="NAME", help="a named shape (%(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="the shape in this checkpoint's config.json instead")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="pictures of the video, two of which are a temporal patch of Qwen (default: the shape's usual)",
    )
    add_retain_ratios(parser, (0.25, 0.2, 0.15, 0.1), "shares of the video tokens that reach the language model")
    parser.add_argument("--protocol", choices=("paper", "exact"), default="paper", help="how to count (%(default)s)")
    add_json(parser, "every number")
    parser.add_rare("--merge-layers", type=numbers(int), metavar="I,I", help="encoder layers after which frames merge")
    parser.add_rare(
        "--schedule",
        type=numbers(float),
        metavar="N,N",
        help="frames at first and after each merge, temporal patches of Qwen (73.9%% stay)",
    )
    add_frame_size(parser)
    parser.add_rare(
        "--prompt-length", type=int, default=32, metavar="N", help="words beside the video, if exact (%(default)s)"
    )
    parser.set_defaults(variant_open=True)  # each row has its own
    # None of the three is an option of the other methods in the table, which names like EarlyTomConfig's would make it.
    parser.add_rare(
        "--encode-ratio",
        dest="share_computed",
        type=float,
        metavar="SHARE",
        help="count EarlyTom with reused patches too, of which this share is computed",
    )
    parser.add_rare(
        "--computed",
        dest="patches_computed",
        type=int,
        metavar="N",
        help="the same by their number, which a report of a call has",
    )
    parser.add_rare(
        "--full-layers",
        dest="layers_in_full",
        type=numbers(int),
        metavar="I,I",
        help="encoder layers that compute all patches then (default: those of the option full_layers)",
    )


def _add_export(parser: CommandParser) -> None:
    parser.description = (
        "Writes the compressed video path of a checkpoint, from pixels to the rows that the language model gets, as "
        "one file that torch alone loads and runs. Compiling takes minutes."
    )
    add_model(parser, required=True, fallback="")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="pictures of each video that it is for (default: what the checkpoint was made for, else 32)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the file, whose name ends in .pt2")
    add_frame_size(parser)
    add_config_flags(parser, leave_out=NOT_EXPORTED)


if __name__ == "__main__":
    sys.exit(main())
