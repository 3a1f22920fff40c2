"""``earlytom bench``: the time to the first token with all tokens and with fewer, side by side in one run."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..benchmarks.arms import (
    EVERY,
    Arm,
    arm_names,
    asked_methods,
    choose,
    make_arms,
    of_method,
    other_methods,
    require_beginnings,
)
from ..benchmarks.ceilings import Clock, ceilings
from ..benchmarks.environment import environment
from ..benchmarks.floor import Work, floor, work_of
from ..benchmarks.forecast import Forecast, corrected, forecast_of, in_words, measured_piece, told
from ..benchmarks.load import server_names
from ..benchmarks.measure import Result, measure
from ..benchmarks.profiling import profile_arms
from ..benchmarks.result_plots import write_plots
from ..benchmarks.results import Workload, tables, to_dict, to_markdown
from ..benchmarks.workload import Inputs, make_inputs, pictures_of_a_frame, random_model
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..flops import Reuse
from ..integrations.preprocess import PixelSettings, video_settings
from ..methods.registry import EARLYTOM
from ..shapes import ModelShape, QwenShape, config_of, shape_of, sized
from ..words import counted
from .bench_load import check_load, measure_loads
from .bench_session import Session
from .loading import (
    checked_config,
    decoded,
    frames_of,
    load_model,
    progress_bars,
    require_layers,
    require_weights,
    resolve_device,
    resolve_dtype,
)
from .options import require_effect
from .outputs import output_console, write_text
from .resume import check_resume, saved_content, stopped
from .toolchain import require_toolchain

_SHAPES_SETTINGS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}  # SigLIP's
_EAGER = "transformers"


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Look, say how long it takes, measure every workload, print and write what came out."""
    _check(arguments, options)
    start = time.perf_counter()
    progress_on, console = Console(stderr=True), output_console(arguments)
    place = resolve_device(arguments.device)
    require_effect(options, place.type)
    shape = _shape(arguments, console)
    frame_counts, clips = _frames(arguments, shape, progress_on)
    about = {**environment(place), **_asked(arguments, options)}
    saved = saved_content(arguments, about, progress_on)
    start -= saved.get("seconds", 0.0)
    _require_compiler(arguments, place, options)
    with progress_bars(progress_on) as progress:
        progress.add_task("loading the weights" if arguments.model else "making the model", total=None)
        model = _model(arguments)
    session = Session(arguments, model, shape, options, clips, about, start, saved, console, progress_on)
    if arguments.concurrency:
        measure_loads(session, frame_counts)
    else:
        _measure_all(session, frame_counts)
    console.print(f"{time.perf_counter() - start:.0f} s in all")


def _measure_all(session: Session, frame_counts: Sequence[int]) -> None:
    """A table for each number of frames; what was measured before is only shown."""
    arguments, console = session.arguments, session.console
    with session.bars("what this machine can do"):
        rates = _ceilings(session)
    known = {content["frames"]: Workload.from_dict(content) for content in session.saved.get("workloads", ())}
    tables_of: dict[int, Workload] = {}  # by frames, in the order of the command
    plots: list[Path] = []

    def write(last: bool = False) -> None:
        # What the file has from before stays in it, whatever this run comes to.
        content = list({**tables_of, **{frames: known[frames] for frames in known if frames not in tables_of}}.values())
        session.write_json(lambda about: to_dict(content, about), last=last)

    try:
        for frames in frame_counts:
            before = known.get(frames)
            if before is not None and _is_done(before, arguments.repeats):
                tables_of[frames] = before
            else:
                earlier = before.results if before else []
                _measure(session, frames, rates, earlier, tables_of, write, several=len(frame_counts) > 1)
            console.print(*tables(tables_of[frames]))
            write(last=frames == frame_counts[-1])
            plots = _write_documents(session, list(tables_of.values()))
    except KeyboardInterrupt:
        raise stopped(arguments, _what_is_there(list(tables_of.values()), arguments.repeats)) from None
    for plot in plots:
        console.print(f"wrote {plot}")


def _is_done(workload: Workload, repeats: int) -> bool:
    return workload.complete and all(result.rounds >= repeats for result in workload.measured)


def _what_is_there(workloads: Sequence[Workload], repeats: int) -> str:
    """For somebody who stopped it."""
    done = sum(workload.complete for workload in workloads)
    parts = [counted(done, "finished table")] if done else []
    for workload in workloads:
        if not workload.complete and any(result.rounds for result in workload.measured):
            rounds = min(result.rounds for result in workload.measured)
            parts.append(f"{rounds} of {counted(repeats, 'round')} at {workload.frames} frames")
    return " and ".join(parts)


def _require_compiler(arguments: argparse.Namespace, device: torch.device, options: dict[str, Any]) -> None:
    """Whatever EarlyTom's lowering is, the other arms are Inductor's."""
    ours = bool(arguments.arms) and all(_is_not_inductors(name) for name in arguments.arms)
    otherwise = f"--lowering eager --arms {_EAGER},{EARLYTOM}, which compile nothing"
    require_toolchain(device, options if ours else {}, otherwise=otherwise)


def _is_not_inductors(beginning: str) -> bool:
    return any(beginning.startswith(name) for name in (_EAGER, EARLYTOM, *other_methods()))


def _asked(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What the numbers depend on beside the machine."""
    name = {"model": arguments.model} if arguments.model else {"shape": arguments.shape}
    made_up = {"scene_frames": arguments.scene_frames, "redundancy": arguments.redundancy}
    names = ("batch", "prompt_length", "decode_tokens", "retain_ratios", "arms", "dtype")
    load = ("max_batch", "repeats") if arguments.concurrency else ()
    return {
        **name,
        **({"video": arguments.video} if arguments.video else made_up),
        "asked": {name: getattr(arguments, name) for name in (*names, *load)},
        "options": options,
    }


def _measure(
    session: Session,
    frames: int,
    rates: dict[str, float],
    earlier: Sequence[Result],
    tables_of: dict[int, Workload],
    write: Callable[[], None],
    several: bool,
) -> None:
    """Every arm: timed in turn, then one call each under the profiler, and its floor.

    ``tables_of[frames]`` has what there is from the first call on, and ``write`` is called after each that was timed.
    """
    arguments, model = session.arguments, session.model
    dtype = str(model.dtype).removeprefix("torch.")
    inputs = make_inputs(model, frames=frames, batch=arguments.batch, **session.look(frames))
    methods = asked_methods(arguments.retain_ratios, arguments.arms)
    arms = choose(make_arms(model, inputs, arguments.retain_ratios, session.options, methods), arguments.arms)

    forecast: Forecast | None = None  # until it was corrected

    def correct(results: list[Result]) -> None:
        nonlocal forecast
        if forecast is None or earlier:
            return
        cold = {result.name: result.cold for result in results if result.cold}
        left = corrected(forecast, session.layers, session.options.get("lowering", "staged"), cold)
        if left is not None:
            forecast = None
            session.say(f"{frames} frames: compilation does not take what was guessed; from here on {in_words(left)}")

    def save(results: list[Result], complete: bool = False) -> None:
        correct(results)
        tables_of[frames] = Workload(
            frames,
            arguments.batch,
            arguments.prompt_length,
            results,
            dtype,
            rates,
            complete=complete,
            pictures=pictures_of_a_frame(model.config),
        )
        if complete or any(result.rounds for result in results):  # else there is nothing yet to go on with
            write()

    with session.bars(f"{frames} frames") as progress, tempfile.TemporaryDirectory(prefix="earlytom-bench-") as caches:
        forecast = _say_how_long(session, arms, inputs, frames, progress)
        results = measure(
            model,
            arms,
            repeats=arguments.repeats,
            decode_tokens=arguments.decode_tokens,
            progress=progress,
            caches=caches,
            earlier=earlier,
            save=save,
        )
        able = [arm for arm, result in zip(arms, results, strict=True) if not result.failure]
        breakdowns, trace = profile_arms(model, able, progress)
    for arm, result in zip(arms, results, strict=True):
        result.breakdown = breakdowns.get(arm.name)
        if rates and not result.failure:
            result.floor = floor(_work(session, arm, result), rates)
    save(results, complete=True)
    if arguments.trace:
        path = _trace_path(Path(arguments.trace), frames if several else None)
        write_text(path, json.dumps(trace))
        session.console.print(f"wrote {path}")


def _say_how_long(
    session: Session, arms: Sequence[Arm], inputs: Inputs, frames: int, progress: Callable[[str], None]
) -> Forecast | None:
    """What it said, if it could say anything."""
    progress("one call to see how long all takes")
    piece = measured_piece(session.model, inputs)
    if piece is None:
        return None
    arguments = session.arguments
    forecast = forecast_of(
        arms,
        piece,
        frames=frames,
        repeats=arguments.repeats,
        decode_tokens=arguments.decode_tokens,
        layers=session.layers,
        lowering=session.options.get("lowering", "staged"),
    )
    calls = f"{counted(len(arms), 'arm')}, a first call and {counted(arguments.repeats, 'round')} of each"
    session.say(f"{frames} frames: {calls}, {told(forecast, piece)}")
    return forecast


def _shape(arguments: argparse.Namespace, console: Console) -> ModelShape | None:
    """Of the model, with pictures of the size that was asked for; None where its work cannot be counted."""
    shape: ModelShape | None = None
    try:
        shape = ModelShape.from_config(_config(arguments)) if arguments.model else shape_of(arguments.shape)
    except EarlyTomConfigError as reason:
        console.print(f"no floor: {reason}")
    return sized(shape, arguments.frame_size)


def _ceilings(session: Session) -> dict[str, float]:
    """Those of the machine; none where the work of the model cannot be counted."""
    model = session.model
    return ceilings(Clock(model.device), model.dtype, model.device) if session.shape is not None else {}


def _work(session: Session, arm: Arm, result: Result) -> dict[str, Work]:
    model, config = session.model, EarlyTomConfig.from_options(arm.options)
    layers = model.config.text_config.num_hidden_layers
    return work_of(
        model,
        schedules=result.frames or [[arm.frames]] * session.arguments.batch,
        prompt=result.starts,
        merge_layers=result.merge_layers or None,
        variant=config.variant,
        method=config.method,
        kept=result.kept,
        steps=config.steps_inside(layers) if arm.compresses else (),
        reuse=[Reuse(computed, tuple(result.full_layers), distinct) for _, computed, distinct in result.patches],
        shape=session.shape,
    )


def _trace_path(path: Path, frames: int | None) -> Path:
    """The file asked for, or one for each number of frames."""
    return path if frames is None else path.with_stem(f"{path.stem}-{frames}-frames")


def _frames(
    arguments: argparse.Namespace, shape: ModelShape | None, progress_on: Console
) -> tuple[tuple[int, ...], dict[int, torch.Tensor]]:
    """The numbers of frames, and the video's pixels for each, where one is given: [frames, 3, H, W]."""
    default = frames_of(arguments.model) if arguments.model else shape_of(arguments.shape).frames
    if not arguments.video:
        return tuple(dict.fromkeys(arguments.frames or (default,))), {}
    height, width = _picture_size(_config(arguments), shape)
    settings = video_settings(arguments.model) if arguments.model else _SHAPES_SETTINGS
    if isinstance(shape, QwenShape):
        settings = {name: value for name, value in settings.items() if name != "size"}
    pixels = PixelSettings.from_settings({"size": {"height": height, "width": width}, **settings})
    clips = {}
    for frames in arguments.frames or (None,):
        clip = decoded(arguments.video, pixels, frames, default, progress_on)
        clips[len(clip)] = clip
    return tuple(clips), clips


def _picture_size(config: Any, shape: ModelShape | None) -> tuple[int, int]:
    """Height and width that a video's pictures get; a model of Qwen could have any."""
    if isinstance(shape, QwenShape):
        return shape.picture_size
    return config.vision_config.image_size, config.vision_config.image_size


def _config(arguments: argparse.Namespace) -> Any:
    """Of the model."""
    return checked_config(arguments.model)[1] if arguments.model else config_of(arguments.shape)


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.model:
        return load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    device = resolve_device(arguments.device)
    config = config_of(arguments.shape)
    return random_model(config, device=device, dtype=resolve_dtype(arguments.dtype, device, torch.bfloat16))


def _check(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    for name in ("batch", "repeats", "prompt_length"):
        if getattr(arguments, name) < 1:
            raise EarlyTomConfigError(f"{name}={getattr(arguments, name)}: must be at least 1.")
    if arguments.decode_tokens < 0:
        raise EarlyTomConfigError(f"decode_tokens={arguments.decode_tokens}: must be at least 0.")
    if arguments.frames and min(arguments.frames) < 1:
        raise EarlyTomConfigError(f"frames={min(arguments.frames)}: must be at least 1.")
    if arguments.concurrency:
        check_load(arguments)
        if arguments.trace:
            raise EarlyTomConfigError(f"trace={arguments.trace!r} with --concurrency: calls are traced without load.")
    for ratio in arguments.retain_ratios:
        EarlyTomConfig.from_options({**options, "retain_ratio": ratio})
    config = _config(arguments)
    require_layers(config, options)
    if arguments.model:
        require_weights(arguments.model)
    ratios = arguments.retain_ratios
    names = server_names(ratios) if arguments.concurrency else arm_names(ratios, options, other_methods(), config)
    require_beginnings(names, arguments.arms)
    for method in () if arguments.concurrency else asked_methods(ratios, arguments.arms):
        chosen = of_method(method, options)
        require_layers(config, chosen)
        EarlyTomConfig.from_options(chosen).steps_inside(config.text_config.num_hidden_layers)
    _refuse_what_does_nothing(arguments, options)
    check_resume(arguments)


def _refuse_what_does_nothing(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for options that the others leave nothing to do for."""
    given, arms = arguments.given, arguments.arms
    if arguments.model and "shape" in given:
        raise EarlyTomConfigError(f"shape={arguments.shape!r} with --model: the checkpoint has a shape; give one.")
    for name in ("scene_frames", "redundancy"):
        if arguments.video and name in given:
            raise EarlyTomConfigError(
                f"{name}={getattr(arguments, name)} with --video: it is of the synthetic video; give one."
            )
    if "max_batch" in given and not arguments.concurrency:
        raise EarlyTomConfigError(
            f"max_batch={arguments.max_batch} without --concurrency: there is no queue that makes batches; "
            "take --batch."
        )
    if "method" in options and not arguments.concurrency:
        raise EarlyTomConfigError(
            f"method={options['method']!r}: methods are arms of their own; say --arms {options['method']}."
        )
    inductors = any(not _EAGER.startswith(name) and not name.startswith(_EAGER) for name in arms)
    idle = options.keys() - _taken(arguments, options) - ({"mode"} if inductors else set())
    if idle:
        raise EarlyTomConfigError(f"{min(idle)} with --arms {','.join(arms)}: none of them takes it.")
    if "retain_ratios" in given and arms and all(name in (_EAGER, "inductor") for name in arms):
        raise EarlyTomConfigError(f"retain_ratios with --arms {','.join(arms)}: they keep all tokens.")


def _taken(arguments: argparse.Namespace, options: dict[str, Any]) -> set[str]:
    """Names of those of ``options`` that some arm takes."""
    arms = arguments.arms
    if not arms or EVERY in arms or any(name.startswith(EARLYTOM) or EARLYTOM.startswith(name) for name in arms):
        return {*options}
    return {name for method in asked_methods(arguments.retain_ratios, arms) for name in of_method(method, options)}


def _write_documents(session: Session, workloads: list[Workload]) -> list[Path]:
    """What was asked for, over what was there; returns the plots."""
    arguments = session.arguments
    if arguments.markdown:
        write_text(arguments.markdown, to_markdown(workloads, session.told()))
    return write_plots(workloads, Path(arguments.plot)) if arguments.plot else []
