"""The flags of ``earlytom eval``, which has three kinds of evaluation: ``--toy``, ``--tasks`` and ``--fidelity``."""

import argparse

from .flags import add_device, add_documents, add_dtype, add_json, add_repeats, add_resume, add_retain_ratios, numbers
from .options import add_config_flags
from .parser import CommandParser

KNOWN_VIDEOS = ("carphone", "bunny", "bikes")
"""Videos that ``--fidelity`` finds by name, in an optional package."""


def add_eval(parser: CommandParser) -> None:
    """Every flag of the command, and which of its three kinds of evaluation each belongs to."""
    parser.description = (
        "What compression costs in answers, and in features. --toy: a small model, trained for it, is asked about "
        "synthetic videos; EarlyTom stands beside parts of it, trivial ways to fewer tokens and, with --methods all, "
        "the methods of other papers. --tasks: a "
        "checkpoint of yours answers benchmarks of lmms-eval (pip install '.[eval]'), and the columns are those "
        "of the paper's Table 1. --fidelity: the features of a vision encoder beside those of cheaper ones, on real "
        "videos (pip install '.[fidelity]' for an encoder and three of them)."
    )
    parser.add_argument("--toy", action="store_true", help="questions about the videos of a toy world")
    parser.add_argument(
        "--world",
        default="toy",
        choices=("toy", "photo"),
        help="with --toy: photo is examples/photoworld (%(default)s)",
    )
    parser.add_argument(
        "--tasks",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME",
        help="lmms-eval's, such as mvbench,videomme,egoschema,longvideobench_val_v; those of Table 8 have its settings",
    )
    parser.add_argument("--fidelity", action="store_true", help="features of a vision encoder, without questions")
    parser.add_argument(
        "--model",
        action="append",
        metavar="PATH_OR_HUB_ID",
        help="with --tasks: the checkpoint; with --toy: one trained on it, or several (repeated), for their mean; with "
        "--fidelity: one that is or has a vision encoder (default: DINOv2 ViT-S/14)",
    )
    parser.add_argument(
        "--video",
        action="append",
        metavar="FILE_OR_NAME",
        help="with --fidelity: a file, or carphone, bunny or bikes; may be repeated (default: these three)",
    )
    parser.add_argument(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME",
        help="with --toy: beside all tokens only methods whose names begin so, such as earlytom,visionzip; all: every "
        "one, those of other papers too (default: all but those)",
    )
    parser.add_argument(
        "--variant",
        default=argparse.SUPPRESS,
        choices=("paper", "released", "plus"),
        help="with --toy: the same as --methods 'earlytom VARIANT'; with --tasks: EarlyTom's (plus; "
        "paper where one of the tasks takes its settings from Table 8)",
    )
    parser.add_argument(
        "--pareto",
        action="store_true",
        help="with --toy: what accuracy costs, with other layers, thresholds, baselines; and which rows nothing beats",
    )
    add_retain_ratios(parser, (0.25, 0.2, 0.15, 0.1), "shares of the video tokens")
    parser.add_argument(
        "--try",
        dest="try_",
        action="append",
        default=[],
        metavar="'NAME=VALUE ...'",
        help="with --toy: methods that take these options are tried with them once more; may be repeated",
    )
    parser.add_argument("--videos", type=int, default=1000, metavar="N", help="with --toy: how many (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: only the first N questions of each")
    add_repeats(parser, "with --toy: videos on which the first token is timed, all rows in turn (%(default)s)", 20)
    add_json(parser, "every number, after every row or task")
    add_resume(parser, "only what --json lacks")
    add_device(parser)
    add_dtype(parser)
    parser.add_rare(
        "--frames",
        type=int,
        metavar="N",
        help="of each video, with --tasks (default: the checkpoint's) and --fidelity (32)",
    )
    parser.add_rare("--batch-size", type=int, default=1, metavar="N", help="questions of a call (%(default)s)")
    parser.add_rare(
        "--model-args",
        metavar="NAME=VALUE,...",
        help="with --tasks, for checkpoints of LLaVA's own code: conv_template, add_time_instruction, ...",
    )
    parser.add_rare("--include-path", metavar="DIR", help="a folder of tasks of your own, for --tasks")
    parser.add_rare("--split", default="test", choices=("validation", "test"), help="of the videos (%(default)s)")
    parser.add_rare("--first", type=int, default=0, metavar="N", help="number of the first one (%(default)s)")
    parser.add_rare("--encoded", action="store_true", help="the toy world's frames as they come out of an H.264 file")
    parser.add_rare(
        "--noise",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of noise in the toy world's pixels, of which black is -1 and white 1 (%(default)s)",
    )
    _add_fidelity(parser)
    add_documents(parser, "the table")
    # A call that would run uncompressed must not count as a compressed one; nor is the full model compiled.
    add_config_flags(parser, leave_out=("retain_ratio", "variant"), lowering="eager", strict=True)


def _add_fidelity(parser: CommandParser) -> None:
    """What ``--fidelity`` measures; each threshold and each budget with each set of full layers."""
    parser.set_defaults(known_videos=KNOWN_VIDEOS)
    parser.add_rare(
        "--tau-segs",
        type=numbers(float),
        default=(0.6, 0.8, 0.9),
        metavar="T,T",
        help="with --fidelity: tau_seg of merging (0.6,0.8,0.9)",
    )
    parser.add_rare(
        "--tau-reuses",
        type=numbers(float),
        default=(0.02, 0.04, 0.06, 0.1, 0.15),
        metavar="T,T",
        help="with --fidelity: thresholds of reuse, in the encoder's pixels (0.02,0.04,0.06,0.1,0.15)",
    )
    parser.add_rare(
        "--encode-ratios",
        type=numbers(float),
        default=(0.35, 0.5),
        metavar="R,R",
        help="with --fidelity: budgets of reuse (0.35,0.5)",
    )
    parser.add_rare(
        "--full-layer-sets",
        type=_layer_sets,
        default=("default", "last1", "none"),
        metavar="SET,SET",
        help="with --fidelity: layers that reuse computes in full: default, none, lastN or numbers such as 8+11 "
        "(default,last1,none)",
    )


def _layer_sets(text: str) -> tuple[str | tuple[int, ...], ...]:
    """``"default,last2,8+11"`` -> ("default", "last2", (8, 11)); which layers there are, the encoder tells later."""
    return tuple(map(_layer_set, text.split(",")))


def _layer_set(word: str) -> str | tuple[int, ...]:
    numbered = word.removeprefix("last")
    if word in ("default", "none") or (numbered != word and numbered.isdecimal() and int(numbered) > 0):
        return word
    if all(part.isdecimal() for part in word.split("+")):
        return tuple(sorted({int(part) for part in word.split("+")}))
    raise argparse.ArgumentTypeError(
        f"{word!r}: must be default, none, last1, last2, ... or numbers of layers with + between, as 8+11."
    )
