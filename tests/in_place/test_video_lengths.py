"""Videos of every length through one compiled vision path, and what stays compiled when options change."""

import pytest
import torch
from effort import cases
from generating import compiled, graphs_compiled, new_tokens, oracle_tokens
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from oracle import compressed_videos
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, report, stages
from earlytom_compile.integrations import prefill
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)

VARIANTS = ("paper", "released", "plus")
OPTIONS = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3}


@pytest.fixture
def model(pristine):
    yield pristine
    earlytom_compile.restore(pristine)


def features(model, frames, seed=0):
    """The rows of one video, newline last, and its frame counts."""
    (rows,) = earlytom_compile.encode_videos(model, video_inputs(model, frames, seed=seed)["pixel_values_videos"])
    (video,) = report(model).to_dict()["videos"]
    return rows, video


def expected_features(model, frames, variant, retain_ratio, seed=0):
    earlytom_compile.restore(model)
    with torch.no_grad():
        (video,) = compressed_videos(
            model, video_inputs(model, frames, seed=seed), retain_ratio=retain_ratio, **{**OPTIONS, "variant": variant}
        )
    return video


@pytest.mark.parametrize("variant", cases(("released",), among=[(variant,) for variant in VARIANTS]))
def test_one_graph_serves_every_length(model, variant):
    lengths = (9, 2, 3, 4, 5, 16, 33, 7)
    compiled(model, retain_ratio=0.3, **{**OPTIONS, "variant": variant})
    got = {frames: features(model, frames, seed=frames) for frames in lengths}
    assert graphs_compiled() == 1 and report(model).to_dict()["graphs"] == 1
    for frames, (rows, counts) in got.items():
        expected = expected_features(model, frames, variant, 0.3, seed=frames)
        torch.testing.assert_close(rows, expected.features, atol=1e-5, rtol=1e-5)
        assert counts["frames"] == [frames, *expected.frames_after]
        assert counts["tokens"] == [frames * tokens_per_frame(model), len(expected.kept)]


def test_thirty_two_lengths_are_two_compilations(model):
    """Of one frame, which PyTorch compiles for itself, and of all others; prompts of every length are one more."""
    compiled(model, lowering="eager")
    for frames in range(1, 33):
        new_tokens(model, video_inputs(model, frames, scenes=1, after=1 + frames % 5), max_new_tokens=1)
    content = report(model).to_dict()
    assert content["graphs"] == 2 and content["recompiles"] == 0


@pytest.mark.usefixtures("shared_vision")
def test_pieces_serve_every_length(model, monkeypatch):
    """The layers before the first merge are of one kind with those behind it."""
    lowered = []
    monkeypatch.setattr(stages, "lower", lambda graph, *args: lowered.append(graph) or graph.forward)
    compiled(model, lowering="staged", compile_llm=False)
    inputs = [video_inputs(model, frames) for frames in (12, 5)]
    got = [new_tokens(model, call) for call in inputs]
    assert len(lowered) == 4, "embeddings, a layer, one that scores tokens, and what follows the encoder"
    for tokens, call in zip(got, inputs, strict=True):
        assert torch.equal(tokens, oracle_tokens(model, call))


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_inductor_serves_every_length(variant):
    model = tiny_llava_onevision(vision_layers=4, text_layers=1)
    compiled(model, retain_ratio=0.3, lowering="staged", **{**OPTIONS, "variant": variant})
    got = {frames: features(model, frames, seed=frames)[0] for frames in (9, 2, 16, 5)}
    assert report(model).to_dict()["graphs"] == 1
    for frames, rows in got.items():
        expected = expected_features(model, frames, variant, 0.3, seed=frames)
        torch.testing.assert_close(rows, expected.features, atol=1e-4, rtol=1e-4)


def test_cuda_graphs_keep_a_length_each(model, monkeypatch):
    leave_pieces_as_they_are(monkeypatch)
    compiled(model, lowering="staged", mode="reduce-overhead", compile_llm=False)
    features(model, 5), features(model, 6), features(model, 5)
    assert report(model).to_dict()["graphs"] == 2


class TestCompilingAgain:
    """``compile()`` on a model that is compiled."""

    @pytest.fixture
    def lowered(self, monkeypatch):
        pieces = []
        monkeypatch.setattr(stages, "lower", lambda graph, *args: pieces.append(graph) or graph.forward)
        return pieces

    def test_the_same_options_keep_everything(self, model, lowered):
        inputs = video_inputs(model, 12)
        before = new_tokens(compiled(model, lowering="staged"), inputs)
        graphs, pieces = graphs_compiled(), len(lowered)
        assert torch.equal(new_tokens(compiled(model, lowering="staged"), inputs), before)
        assert (graphs_compiled(), len(lowered)) == (graphs, pieces)

    def test_another_ratio_keeps_the_layers_and_the_prompt(self, model, lowered):
        inputs = video_inputs(model, 12)
        new_tokens(compiled(model, lowering="staged"), inputs)
        pieces = len(lowered)
        got = new_tokens(compiled(model, lowering="staged", retain_ratio=0.5), inputs)
        layers = [graph for graph in lowered[pieces:] if "scaled_dot_product_attention" in str(graph.graph)]
        assert not layers and len(lowered) - pieces <= 2, "at most what is in front of the layers and behind them"
        assert torch.equal(got, oracle_tokens(model, inputs, retain_ratio=0.5))

    def test_a_wrapper_of_somebody_else_is_respected(self, model):
        compiled(model)
        own = model.forward
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
        compiled(model)
        assert model.__dict__["forward"].__class__.__name__ == "Method"

    def test_restored_means_restored(self, model):
        own = model.model.language_model.forward
        compiled(model, lowering="staged")
        compiled(model, lowering="staged", retain_ratio=0.5)
        earlytom_compile.restore(model)
        assert model.model.language_model.forward == own and "forward" not in model.model.language_model.__dict__


@pytest.mark.usefixtures("shared_vision")
@pytest.mark.parametrize("positions, graphs", [(127, 1), (128, 2)])
def test_short_prompts_are_not_compiled_on_a_cpu(model, monkeypatch, positions, graphs):
    monkeypatch.setattr(prefill, "FEWEST_POSITIONS_ON_CPU", 128)
    leave_pieces_as_they_are(monkeypatch)
    compiled(model, lowering="staged")
    inputs = video_inputs(model, 12, before=1, after=1)
    new_tokens(model, inputs, max_new_tokens=1)
    _, cut = report(model).to_dict()["prompt"]
    inputs = video_inputs(model, 12, before=1, after=1 + positions - cut)
    got = new_tokens(model, inputs)
    assert report(model).to_dict()["prompt"][1] == positions
    assert report(model).to_dict()["graphs"] == graphs
    assert torch.equal(got, oracle_tokens(model, inputs))


@pytest.mark.parametrize(
    "shape, given_shape",
    [((1, 0, 3, 24, 24), "0, 3"), ((1, 6, 1, 24, 24), "6, 1"), ((1, 6, 3, 24, 48), "24, 48"), ((6, 3, 24, 24), "")],
)
def test_shapes_that_the_tower_cannot_take_are_named(model, shape, given_shape):
    inputs = video_inputs(model, 6)
    compiled(model)
    odd = {**inputs, "pixel_values_videos": torch.zeros(shape)}
    for call in (lambda: new_tokens(model, odd), lambda: model(**odd)):
        with pytest.raises(EarlyTomConfigError, match=rf"{given_shape}.*\(3, 24, 24\)"), torch.no_grad():
            call()
    with pytest.raises(EarlyTomConfigError, match="processor"):
        earlytom_compile.encode_videos(model, odd["pixel_values_videos"])


@settings(max_examples=200)
@drawn(frames=st.integers(1, 5000), tokens=st.integers(1, 800), percent=st.integers(1, 1000))
def test_the_budget_is_that_of_the_formula(frames, tokens, percent):
    """Where r F P is no tie, against whole numbers; the rounding of ties is Python's, as in the specification."""
    ratio = percent / 1000
    budget, fewest = torch.ops.earlytom.video_budget(frames, tokens, ratio).tolist()
    exact, thousandths = divmod(percent * frames * tokens, 1000)
    if thousandths != 500:
        assert budget == max(1, exact + (thousandths > 500))
    assert budget in (max(1, exact), exact + 1)
    assert fewest * 1000 >= percent * frames > (fewest - 1) * 1000 - 1e-6 * frames


def test_a_budget_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="frames=0"):
        torch.ops.earlytom.video_budget(0, 9, 0.1)
    torch.library.opcheck(torch.ops.earlytom.video_budget.default, (4, 9, 0.1))


@settings(max_examples=200)
@drawn(frames=st.integers(1, 5000), places=st.integers(1, 800), prefix=st.integers(0, 5), percent=st.integers(1, 1000))
def test_the_budget_of_places_is_that_of_the_formula(frames, places, prefix, percent):
    """Where r F S is no tie, against whole numbers."""
    places += prefix
    budget = torch.ops.earlytom.place_budget(frames, places, prefix, percent / 1000)
    assert budget.dtype == torch.int64 and budget.shape == () and budget.device.type == "cpu"
    exact, thousandths = divmod(percent * frames * places, 1000)
    fewest = places + (frames - 1) * prefix
    if thousandths != 500:
        assert budget == max(fewest, exact + (thousandths > 500))
    assert budget in (max(fewest, exact), max(fewest, exact + 1))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((0, 9, 1, 0.1), "frames=0"),
        ((4, 0, 0, 0.1), "places=0"),
        ((4, 9, -1, 0.1), "prefix=-1"),
        ((4, 9, 10, 0.1), "prefix=10"),
    ],
)
def test_a_budget_of_no_places_is_an_error(arguments, says):
    with pytest.raises(ValueError, match=f"place_budget.*{says}"):
        torch.ops.earlytom.place_budget(*arguments)


def test_a_budget_of_places_outside_its_range_is_an_error():
    for ratio in (0.0, 1.1):
        with pytest.raises(EarlyTomConfigError, match="encode_ratio"):
            torch.ops.earlytom.place_budget(4, 9, 1, ratio)
    torch.library.opcheck(torch.ops.earlytom.place_budget.default, (4, 9, 1, 0.1))
