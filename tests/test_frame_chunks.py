"""Long videos in chunks: the same rows bit for bit, no layer sees more frames than fit, and memory stays."""

from itertools import product

import pytest
import torch
from effort import cases, examples
from frame_memory import RESET, hidden_bytes, peak_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import compressed_videos
from tiny_models import tiny_llava_onevision, video_inputs
from tiny_qwen import Clip, qwen_inputs, tiny_qwen
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import frame_chunks, report
from earlytom_compile.frame_chunks import ChunkedRun
from earlytom_compile.passes.find_frame_runs import Share

FRAMES, PLACES = 50, 36
OPTIONS = {"variant": "paper", "merge_layers": (0, 2), "tau_seg": 0.3, "retain_ratio": 0.2, "compile_llm": False}
WAYS = {
    "paper": {"variant": "paper"},
    "released": {"variant": "released"},
    "plus": {"variant": "plus", "merge_layers": None, "full_layers": (3, 4, 5)},
    "a budget": {"reuse": True, "encode_ratio": 0.4},
    "another method": {"method": "visionzip", "variant": None, "merge_layers": None, "tau_seg": None},
}


@examples(100)
@given(frames=st.integers(1, 400), at_once=st.integers(0, 50))
def test_chunks_cover_all_frames_and_are_as_even_as_they_can_be(frames, at_once):
    seen = []

    def run(x, number, other):
        seen.append((len(x), number, other))
        return x * 2, number * 3, other

    shares = (Share(0, 1), Share(None, 5), None)
    x = torch.arange(3.0 * frames).view(frames, 3)
    doubled, number, other = ChunkedRun(run, shares, (Share(0, 1), Share(None, 15), None), at_once)(
        x, frames * 5, "same"
    )
    assert torch.equal(doubled, x * 2) and (number, other) == (frames * 15, "same")
    lengths = [length for length, *_ in seen]
    assert seen == [(length, length * 5, "same") for length in lengths]
    assert sum(lengths) == frames and max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(2, frames) and max(lengths) <= max(2, at_once) + 1
    assert len(lengths) == 1 or frames > max(2, at_once)


def test_what_comes_of_chunks_is_laid_out_as_if_there_had_been_none():
    def run(pixels):
        assert pixels.is_contiguous()
        frames = pixels.flatten(0, 1)
        across = frames.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # whose frames do not lie apart
        rows = frames.transpose(1, 2).contiguous().transpose(1, 2)
        return across, rows, frames.view(-1, 4), frames.sum((1, 2)).unsqueeze(0)

    pixels = torch.randn(1, 9, 3, 4)
    run_in_chunks = ChunkedRun(run, [Share(1, 1)], [Share(0, 1), Share(0, 1), Share(0, 3), Share(1, 1)], 4)
    made, expected = run_in_chunks(pixels), run(pixels)
    assert all(map(torch.equal, made, expected))
    assert [x.stride() for x in made[1:]] == [x.stride() for x in expected[1:]]


@pytest.fixture
def seen(monkeypatch):
    """Frames that went through at once, of each run and call."""
    lengths = []

    class Watched(ChunkedRun):
        def __init__(self, run, inputs, outputs, at_once):
            at, share = next((i, share) for i, share in enumerate(inputs) if share and share.axis is not None)

            def watched(*args):
                lengths.append(args[at].shape[share.axis] // share.each)
                return run(*args)

            super().__init__(watched, inputs, outputs, at_once)

    monkeypatch.setattr(frame_chunks, "ChunkedRun", Watched)
    return lengths


def rows(monkeypatch, model, frames, places_at_once, **options):
    monkeypatch.setattr(frame_chunks, "PLACES_AT_ONCE", {"cpu": places_at_once})
    given = {key: value for key, value in {**OPTIONS, **options}.items() if value is not None}
    earlytom_compile.compile(model, **given)
    with torch.no_grad():
        (found,) = earlytom_compile.encode_videos(model, video_inputs(model, frames)["pixel_values_videos"])
    (video,) = report(model).to_dict()["videos"]
    earlytom_compile.restore(model)
    return found, video["frames"]


@pytest.mark.parametrize(
    "way, lowering",
    cases(
        ("paper", "staged"), ("plus", "eager"), ("a budget", "staged"), among=list(product(WAYS, ["staged", "eager"]))
    ),
)
def test_chunks_change_nothing(monkeypatch, seen, way, lowering):
    leave_pieces_as_they_are(monkeypatch)
    model = tiny_llava_onevision()
    expected, counts = rows(monkeypatch, model, FRAMES, 10**9, lowering=lowering, **WAYS[way])
    whole = seen.copy()
    seen.clear()
    found, _ = rows(monkeypatch, model, FRAMES, 8 * PLACES, lowering=lowering, **WAYS[way])
    assert torch.equal(found, expected)
    assert max(whole) == counts[0] == FRAMES and max(seen) == 8
    assert sum(seen) == sum(whole)  # each run got all of its frames


@pytest.mark.parametrize("kind", cases(("qwen2_5_vl",), among=[("qwen2_5_vl",), ("qwen3_vl",), ("qwen3_5",)]))
def test_towers_of_qwen_go_through_in_chunks_from_pixels_to_tokens(monkeypatch, seen, kind):
    leave_pieces_as_they_are(monkeypatch)
    inputs, found = qwen_inputs(tiny_qwen(kind), [[3, Clip(FRAMES, 6, 10), 4]]), []
    for places_at_once in (10**9, 8 * 60):
        seen.clear()
        monkeypatch.setattr(frame_chunks, "PLACES_AT_ONCE", {"cpu": places_at_once})
        model = earlytom_compile.compile(tiny_qwen(kind), **{**OPTIONS, "merge_layers": (1, 3)})
        pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        found += earlytom_compile.encode_videos(model, pixels, video_grid_thw=grid)
    (video,) = report(model).to_dict()["videos"]
    assert torch.equal(*found) and max(seen) <= 9
    assert sum(seen) == sum(video["frames"])  # before each merge, and behind the last: three runs


@pytest.mark.parametrize("variant", ["paper", pytest.param("plus", marks=pytest.mark.long)])
def test_inductor_makes_code_for_chunks(monkeypatch, seen, variant):
    model = tiny_llava_onevision()
    options = WAYS[variant] | {"merge_layers": OPTIONS["merge_layers"] if variant == "paper" else None}
    expected, _ = rows(monkeypatch, model, FRAMES, 10**9, **options)
    seen.clear()
    found, _ = rows(monkeypatch, model, FRAMES, 8 * PLACES, **options)
    assert torch.equal(found, expected) and max(seen) == 8


def test_more_frames_than_a_segment_may_have_are_those_of_the_oracle(monkeypatch, seen):
    frames = 131
    leave_pieces_as_they_are(monkeypatch)
    model = tiny_llava_onevision()
    options = {"variant": "paper", "reuse": False, "tau_seg": -1.0}  # nothing but its length ends a segment
    found, _ = rows(monkeypatch, model, frames, 16 * PLACES, **options)
    oracle = {key: value for key, value in {**OPTIONS, **options}.items() if key != "compile_llm"}
    with torch.no_grad():
        (expected,) = compressed_videos(model, video_inputs(model, frames), **oracle)
    torch.testing.assert_close(found, expected.features, rtol=1e-4, atol=1e-4)
    assert max(seen) <= 17


def test_a_video_that_fits_goes_through_as_a_whole(monkeypatch, seen):
    leave_pieces_as_they_are(monkeypatch)
    _, counts = rows(monkeypatch, tiny_llava_onevision(), 12, 12 * PLACES, variant="paper", reuse=False)
    assert seen == list(counts)


@pytest.mark.long
@pytest.mark.skipif(not RESET.exists(), reason="needs Linux, which sets the peak of a process back")
@pytest.mark.parametrize(("model", "states"), [("llava", 3), ("qwen2_5_vl", 4)])
def test_memory_of_768_frames_grows_as_their_hidden_state(model, states):
    few, many, places = 384, 768, 2048
    more_hidden = hidden_bytes(many) - hidden_bytes(few)
    in_chunks = peak_of(model, many, places)
    # One before a run, one behind it, and what goes on from there: tokens of Qwen's tower are wider than its states.
    assert in_chunks - peak_of(model, few, places) < states * more_hidden
    # Nothing of this would be seen if a layer were not larger than the hidden state.
    assert peak_of(model, many, 10**9) - in_chunks > 6 * more_hidden
