"""What an observation says is what the specification decides, and what a compressed call does."""

import math

import pytest
import torch
from effort import examples
from generating import trace_of_video_rows
from hypothesis import given
from hypothesis import strategies as st
from oracle import MergingEncoder, Options, _compress_video
from oracle_tower import layers_in_use, pool_importance
from scenes import video
from tiny_models import tiny_llava_onevision, video_inputs
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfig, EarlyTomConfigError, reference
from earlytom_compile.families.base import Video
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations import observe as observing
from earlytom_compile.integrations.observe import Observer, observe

LAYERS = (0, 1)
SIZE = 24


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=3, text_layers=1)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


class _Watched(MergingEncoder):
    """The oracle's encoder, which also keeps what it merges."""

    def __init__(self, *args):
        super().__init__(*args)
        self.hidden = []

    def _merge(self, index, output):
        self.hidden.append(output[0] if isinstance(output, tuple) else output)
        return super()._merge(index, output)


@st.composite
def pixels(draw, frames):
    """A video [frames, 3, 24, 24]: scenes that drift, or one that stands still."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = {"scenes": draw(st.integers(1, 4)), "drift": draw(st.sampled_from([0.1, 0.4, 0.8]))}
    return video(frames, SIZE, **kinds, static=draw(st.integers(0, 9)) == 0, generator=generator)


@st.composite
def options(draw):
    return {
        "merge_layers": LAYERS,
        "variant": draw(st.sampled_from(["paper", "released", "plus"])),
        "reuse": False,
        "retain_ratio": draw(st.sampled_from([0.05, 0.1, 0.3, 0.9])),
        "tau_seg": draw(st.sampled_from([0.3, 0.6, 0.8, 0.95])),
        "alpha": draw(st.sampled_from([0.3, 0.9, 1.0])),
        "max_window": draw(st.sampled_from([None, None, 3, 5])),
        "tau_merge": draw(st.sampled_from(["segment", "segment", 0.5])),
    }


def seen(one_trace, model, pixels, given):
    observer = Observer(EarlyTomConfig(**given))
    return observer.watch(one_trace.through(observer.backend), family_of(model), model, Video(pixels))


@torch.no_grad()
def specified(model, pixels, given):
    """(hidden states before each merge, the oracle's encoder, what it keeps)."""
    made = Options(**given)
    encoder = _Watched(layers_in_use(model), LAYERS, len(pixels), made)
    with encoder.hooked():
        model.model.vision_tower(pixels)
    return encoder, _compress_video(model, pixels, made)


def weights_of(step):
    weights = torch.zeros(len(step.sources), step.frames)
    for row, source in enumerate(step.sources):
        for frame, weight in source:
            weights[row, frame] = weight
    return weights


@examples(6)
@given(data=st.data())
def test_an_observation_is_what_the_specification_decides(one_trace, model, data):
    frames, chosen = data.draw(pixels(12)), data.draw(options())
    observation = seen(one_trace, model, frames, chosen)
    encoder, kept = specified(model, frames, chosen)
    rules = {"variant": "released" if chosen["variant"] == "released" else "paper"}
    rules |= {name: chosen[name] for name in ("tau_seg", "alpha", "max_window")}
    floor = math.ceil(chosen["retain_ratio"] * len(frames))
    total = torch.eye(len(frames))
    assert [step.layer for step in observation.merges] == list(LAYERS)
    for step, hidden in zip(observation.merges, encoder.hidden, strict=True):
        plan = reference.plan_frame_merge(hidden, **rules, tau_merge=chosen["tau_merge"], min_frames=floor)
        assert [list(segment) for segment in step.segments] == plan.segments.tolist()
        assert torch.equal(weights_of(step) != 0, plan.weights != 0)
        assert_close(weights_of(step), plan.weights)
        total = plan.weights @ total
        alike = [reference.frame_similarity(hidden[t], hidden[t - 1]).item() for t in range(1, len(hidden))]
        assert_close(torch.tensor(step.neighbours), torch.tensor(alike), atol=1e-5, rtol=0)
        assert_is_equation_1(step, hidden, chosen)
    assert observation.frame_counts == (len(frames), *encoder.frames_after)
    of_all = torch.zeros_like(total)
    for row, source in enumerate(observation.origins()):
        of_all[row, [frame for frame, _ in source]] = torch.tensor([weight for _, weight in source])
    assert_close(of_all, total)

    height, width = observation.grid
    assert [(frame, row * width + column) for frame, row, column in observation.kept] == [
        tuple(place) for place in kept.kept.tolist()
    ]
    assert observation.tokens == (kept.placeholders - 1, len(kept.kept))
    ends = {t for segment in encoder.segments.tolist() for t in segment}
    flags = None if chosen["variant"] == "plus" else tuple(t in ends for t in range(encoder.frames_after[-1]))
    assert observation.dynamic == flags
    # plus does not ask for the attention received, and yet what is shown of it is the encoder's.
    assert observation.importance_decides == (chosen["variant"] != "plus")
    assert_close(torch.from_numpy(observation.importance).flatten(1), pool_importance(model, encoder.importance))


def assert_is_equation_1(step, hidden, chosen):
    """The curve that is drawn: it starts at 1 in every segment, and a segment ends where it falls below tau."""
    first, average = 0, 1.0
    heads = [head for head, _ in step.segments[1:]]
    for t in range(1, step.frames):
        other = first if chosen["variant"] == "released" else t - 1
        now, smoothed = step.compared[t - 1], step.smoothed[t - 1]
        if math.isnan(smoothed):  # full, whatever came
            assert math.isnan(now) and t in heads
            window = chosen["max_window"]
            assert t - first == ((window or 8) - 1 if chosen["variant"] == "released" else window)
        else:
            assert now == pytest.approx(reference.frame_similarity(hidden[t], hidden[other]).item(), abs=1e-5)
            average = chosen["alpha"] * now + (1 - chosen["alpha"]) * average
            assert smoothed == pytest.approx(average, abs=1e-5)
            assert (smoothed < chosen["tau_seg"]) == (t in heads)
        if t in heads:
            first, average = t, 1.0
    for (head, tail), threshold in zip(step.segments, step.thresholds, strict=True):
        own = reference.frame_similarity(hidden[tail], hidden[head]).item()
        assert threshold == pytest.approx(own if chosen["tau_merge"] == "segment" else chosen["tau_merge"], abs=1e-5)


@pytest.mark.parametrize("variant", ["paper", "plus"])
@pytest.mark.parametrize("frames", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_video_too_short_to_merge(one_trace, model, frames, variant):
    chosen = {"merge_layers": LAYERS, "variant": variant, "reuse": False, "retain_ratio": 0.4}
    clip = video(frames, SIZE, generator=torch.Generator().manual_seed(0))
    observation = seen(one_trace, model, clip, chosen)
    encoder, kept = specified(model, clip, chosen)
    assert observation.frame_counts[-1] == frames and not any(step.merged for step in observation.merges)
    assert observation.origins() == tuple(((frame, 1.0),) for frame in range(frames))
    assert len(observation.kept) == len(kept.kept)
    assert_close(torch.from_numpy(observation.importance).flatten(1), pool_importance(model, encoder.importance))


def test_observing_leaves_the_model_as_it_was_and_tells_what_its_calls_do(model):
    inputs = video_inputs(model, 12, videos_per_row=(2,))
    chosen = {"merge_layers": LAYERS, "variant": "paper", "retain_ratio": 0.2, "tau_seg": 0.3, "lowering": "eager"}
    earlytom_compile.compile(model, **chosen)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
        before = earlytom_compile.report(model).to_dict()
        observed = observe(model, inputs["pixel_values_videos"], **chosen)
        assert earlytom_compile.report(model).to_dict() == before
    finally:
        earlytom_compile.restore(model)
    assert [list(o.frame_counts) for o in observed] == [video["frames"] for video in before["videos"]]
    assert [list(o.tokens) for o in observed] == [video["tokens"] for video in before["videos"]]
    assert earlytom_compile.report(model).to_dict()["graphs"] == 0


def test_what_cannot_be_observed_is_said(model):
    clip = video_inputs(model, 4)["pixel_values_videos"]
    with pytest.raises(EarlyTomConfigError, match="retain_ratio"):
        observe(model, clip, retain=0.1)
    with pytest.raises(EarlyTomConfigError, match="LlavaOnevision"):
        observe(torch.nn.Linear(1, 1), clip)
    with pytest.raises(EarlyTomConfigError, match="must be"):
        observe(model, clip[0])
    with pytest.raises(EarlyTomConfigError, match=r"frames, .* takes \(3, 24, 24\)"):
        observe(model, clip[..., 1:])
    with torch.compiler.set_stance("force_eager"), pytest.raises(EarlyTomCompileError, match="set_stance"):
        observe(model, clip)


def test_errors_of_the_rewrite_are_raised_at_the_call(one_trace, model, monkeypatch):
    clip = video(12, SIZE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EarlyTomConfigError, match="layer 9 does not exist"):
        seen(one_trace, model, clip, {"variant": "paper", "merge_layers": (9,)})

    def refuse(state):
        raise observing.NotApplicable("it has no encoder", "Pass a video")

    monkeypatch.setattr(observing, "run_passes", refuse)
    with pytest.raises(EarlyTomCompileError, match="nothing to observe: it has no encoder. Pass a video."):
        seen(one_trace, model, clip, {})
