"""``earlytom eval --fidelity``: features of real videos by cheaper vision encoders beside those of the full one.

Read each video -> its features by the full encoder -> by each cheaper one -> table, criterion, plot.

No question is asked: where no large model can be had, this says what compression does to what it would see.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..benchmarks import fidelity, pretrained
from ..benchmarks.environment import environment
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..integrations.pixels import PixelSettings
from ..words import counted
from . import fidelity_report
from .loading import decoded, resolve_device
from .outputs import output_console, write_text
from .progress import progress_bars
from .resume import saved_content, stopped
from .tower_loading import load_tower

OPTIONS = ("tau_segs", "tau_reuses", "encode_ratios", "full_layer_sets")
"""What ``--fidelity`` alone takes, beside the videos."""
_FRAMES = 32
_FILE_WIDTH = 130  # columns, where nobody watches


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Every cheaper encoder on every video; ``options`` are those of :class:`EarlyTomConfig` that were given."""
    _refuse_single_options(arguments, options)
    progress_on, console = Console(stderr=True), output_console(arguments, width=_FILE_WIDTH)
    device = resolve_device(arguments.device)
    videos = _videos(arguments)
    with progress_bars(progress_on) as progress:
        progress.add_task("loading the encoder", total=None)
        tower, pixels = _tower(arguments, device)
    arms = _arms(arguments, tower.layers)
    about = {
        **environment(device),
        "model": tower.name,
        "videos": videos,
        "frames": arguments.frames or "32 at most",
        "size": pixels.size["width"],
    }
    saved = saved_content(arguments, about, progress_on)
    # Rows that were not asked for stay in the file.
    done = {row.key: row for row in map(fidelity_report.row_of, saved.get("rows", ()))}
    asked = [(name, *arm.key) for name in videos for arm in arms]
    encoders = {arm.key: fidelity.compiled(tower, arm) for arm in arms}  # at their first call, for all videos

    def write(last: bool = False) -> None:
        if arguments.json and (last or arguments.json != "-"):
            rows = [done[key] for key in dict.fromkeys([*asked, *done]) if key in done]
            write_text(arguments.json, json.dumps(fidelity_report.to_dict(rows, about), indent=2) + "\n")

    try:
        for name, file in videos.items():
            wanted = [arm for arm in arms if (name, *arm.key) not in done]
            if not wanted:
                continue
            video = decoded(file, pixels, arguments.frames, _FRAMES, progress_on).to(device)
            with progress_bars(progress_on) as progress:
                for row in _measured(tower, name, video, wanted, encoders, progress):
                    done[row.key] = row
                    write()
    except KeyboardInterrupt:
        finished = sum(key in done for key in asked)
        raise stopped(arguments, f"{finished} of {counted(len(asked), 'row')}" if finished else "") from None
    write(last=True)
    _show(arguments, [done[key] for key in asked], tower, about, console)


def _measured(
    tower: fidelity.Tower,
    name: str,
    video: Tensor,
    arms: Sequence[fidelity.Arm],
    encoders: Mapping[Any, Any],
    progress: Progress,
) -> Iterator[fidelity.Row]:
    """A row for each arm, as soon as it is known; ``encoders``: by its key."""
    task = progress.add_task(f"{name}: all features", total=len(arms) + 1)
    full = fidelity.full_features(tower, video)
    for arm in arms:
        progress.update(task, advance=1, description=f"{name}: {arm.method}, {arm.setting}")
        yield fidelity.measure(tower, encoders[arm.key], name, video, full, arm)


def _show(
    arguments: argparse.Namespace,
    rows: list[fidelity.Row],
    tower: fidelity.Tower,
    about: dict[str, Any],
    console: Console,
) -> None:
    default = _default_layers(tower.layers)
    for table in fidelity_report.tables(rows, default):
        console.print(table)
    if arguments.markdown:
        write_text(arguments.markdown, fidelity_report.to_markdown(rows, default, about))
    if arguments.plot:
        console.print(f"wrote {fidelity_report.write_plot(rows, default, Path(arguments.plot))}")


def _refuse_single_options(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    given = [name for name in options if name in arguments.given]
    if given:
        several = {"tau_seg": "--tau-segs", "tau_reuse": "--tau-reuses", "encode_ratio": "--encode-ratios"}
        several["full_layers"] = "--full-layer-sets"
        instead = f"give {several[given[0]]}" if given[0] in several else "leave it out"
        raise EarlyTomConfigError(
            f"{given[0]}={options[given[0]]!r}: --fidelity compares several settings in one table; {instead}."
        )


def _videos(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> file; raises where a package is missing or two videos have one name."""
    given = arguments.video or list(pretrained.CLIPS)
    found: dict[str, str] = {}
    for video in given:
        known = video in pretrained.CLIPS
        name = video if known else Path(video).stem
        if name in found:
            raise EarlyTomConfigError(f"video: two of them are called {name!r}; rows tell them apart by that name.")
        found[name] = str(pretrained.clip_file(video)) if known else video
    return found


def _tower(arguments: argparse.Namespace, device: Any) -> tuple[fidelity.Tower, PixelSettings]:
    if arguments.model:
        module, pixels = load_tower(arguments.model, device=device, dtype=arguments.dtype)
        return fidelity.Tower(str(arguments.model), module, module.config.num_hidden_layers), pixels
    if arguments.dtype not in ("auto", "float32"):
        raise EarlyTomConfigError(f"dtype={arguments.dtype!r}: DINOv2 is measured in float32; leave it out.")
    module = pretrained.dinov2_small().to(device)
    return fidelity.Tower("DINOv2 ViT-S/14", module, module.config.num_hidden_layers), pretrained.PIXELS


def _arms(arguments: argparse.Namespace, layers: int) -> list[fidelity.Arm]:
    """Every one that was asked for, without those that say the same in other words."""
    sets = dict.fromkeys(_layer_set(word, layers) for word in arguments.full_layer_sets)
    arms = fidelity.arms(
        dict.fromkeys(arguments.tau_segs),
        dict.fromkeys(arguments.tau_reuses),
        dict.fromkeys(arguments.encode_ratios),
        list(sets),
    )
    for arm in arms:
        EarlyTomConfig.from_options(arm.options).require_layers(layers)
    return arms


def _layer_set(given: str | tuple[int, ...], layers: int) -> tuple[int, ...]:
    if isinstance(given, tuple):
        return given
    if given == "default":
        return _default_layers(layers)
    last = 0 if given == "none" else int(given.removeprefix("last"))
    if last > layers:
        raise EarlyTomConfigError(f"full_layer_sets: {given}, but the encoder has {counted(layers, 'layer')}.")
    return tuple(range(layers - last, layers))


def _default_layers(layers: int) -> tuple[int, ...]:
    return EarlyTomConfig(reuse=True).resolve_full_layers(layers)
