"""``compile(model)`` where unchanged patches are reused keeps every promise that it keeps where frames merge."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from accelerate import cpu_offload
from effort import cases
from generating import LAYOUTS, graphs_compiled, new_tokens, share_vision_paths, trace_of_video_rows
from oracle import compressed_forward, compressed_generate, compressed_videos
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomConfig, EarlyTomConfigError, EarlyTomFallbackWarning, report, stages
from earlytom_compile.reference import plan_reuse

LAYERS, SIDE, PATCH = 4, 26, 4  # 2 pixels of each side belong to no patch
GRID = SIDE // PATCH
PLACES = GRID**2
FRAMES = 6
PLUS = {"retain_ratio": 0.25}  # the default
BY_ATTENTION = [{"variant": variant, "reuse": True, "merge_layers": (0, 2)} for variant in ("paper", "released")]
WAYS = {"plus": PLUS, **{f"{way['variant']} and reuse": {**PLUS, **way} for way in BY_ATTENTION}}


def tiny(**options):
    sizes = {"vision_layers": LAYERS, "text_layers": 1, "image_size": SIDE, "patch_size": PATCH}
    return tiny_llava_onevision(**{**sizes, **options})


@pytest.fixture(scope="module")
def pristine():
    return tiny()


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    share_vision_paths(one_trace, monkeypatch)
    yield pristine
    earlytom_compile.restore(pristine)


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", "strict": True, **PLUS, **options})


def inputs_of(model, frames=FRAMES, changing=0.3, **layout):
    return video_inputs(model, frames, changing=changing, **layout)


def oracle_tokens(model, inputs, **options):
    earlytom_compile.restore(model)
    return compressed_generate(model, inputs, 6, **{**PLUS, **options})


def planned(pixels, **given):
    """[F] places computed of one video [F, 3, H, W], by the specification."""
    plan = plan_reuse(pixels, (GRID, GRID), (PATCH, PATCH), tau_reuse=EarlyTomConfig.tau_reuse, **given)
    return tuple(plan.active.sum(1).tolist())


def row_alone(inputs, row, videos):
    """One row of a batch without its padding; ``videos``: of each row."""
    real, first = inputs["attention_mask"][row].bool(), sum(videos[:row])
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    if videos[row]:
        alone["pixel_values_videos"] = inputs["pixel_values_videos"][first : first + videos[row]]
    return alone


# --- Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, way",
    cases(
        ("one", "plus"), ("batch of different prompts", "released and reuse"), ("two videos in a row", "plus"),
        *product(["different numbers of videos"], WAYS), ("left padding", "plus"),
        ("images beside videos", "paper and reuse"), ("images beside videos", "plus"),
        among=list(product(LAYOUTS, WAYS)),
    ),
)  # fmt: skip
def test_greedy_tokens_equal_the_oracle(model, layout, way):
    inputs = inputs_of(model, **LAYOUTS[layout])
    got = new_tokens(compiled(model, **WAYS[way]), inputs)
    told = report(model).to_dict()["videos"]
    assert torch.equal(got, oracle_tokens(model, inputs, **WAYS[way]))
    wanted = [planned(pixels) for pixels in inputs["pixel_values_videos"]]
    assert [video["patches"]["by_frame"] for video in told] == wanted
    assert all(PLACES < sum(frames) < FRAMES * PLACES for frames in wanted)
    assert [video["frames"] for video in told] == [[FRAMES]] * len(told)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_forward_equals_the_oracle(model, way):
    inputs = inputs_of(model, videos_per_row=(1, 2), before=(2, 4))
    expected = compressed_forward(model, inputs, **WAYS[way])
    logits = compiled(model, **WAYS[way])(**inputs).logits
    seen = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encode_ratio", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("way", cases(("plus",), among=[(way,) for way in WAYS]))
def test_a_budget_is_kept_exactly(model, way, encode_ratio):
    inputs, options = inputs_of(model, videos_per_row=(1, 1)), {**WAYS[way], "encode_ratio": encode_ratio}
    got, budget = new_tokens(compiled(model, **options), inputs), max(PLACES, round(encode_ratio * FRAMES * PLACES))
    told = [video["patches"]["by_frame"] for video in report(model).to_dict()["videos"]]
    assert torch.equal(got, oracle_tokens(model, inputs, **options))
    assert [sum(frames) for frames in told] == [budget, budget]
    assert told == [planned(pixels, budget=budget) for pixels in inputs["pixel_values_videos"]]


def test_each_row_of_a_batch_is_that_row_alone(model):
    videos = (1, 2, 0, 1)
    inputs = inputs_of(model, videos_per_row=videos, before=(1, 6, 2, 3))
    together = new_tokens(compiled(model), inputs)
    for row in range(4):
        assert torch.equal(new_tokens(model, row_alone(inputs, row, videos))[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_each_video_of_a_call_is_that_video_alone(model, way):
    """One stands still and one is noise, so that nobody's plan is anybody else's."""
    videos = inputs_of(model, videos_per_row=(3,))["pixel_values_videos"]
    videos[0] = videos[0, :1]
    videos[2] = torch.randn(videos[2].shape, generator=torch.Generator().manual_seed(0))
    compiled(model, **WAYS[way])
    together = earlytom_compile.encode_videos(model, videos)
    told = [sum(video["patches"]["by_frame"]) for video in report(model).to_dict()["videos"]]
    assert told[0] == PLACES < told[1] < told[2] == FRAMES * PLACES
    for video, rows in zip(videos, together, strict=True):
        (alone,) = earlytom_compile.encode_videos(model, video[None])
        torch.testing.assert_close(rows, alone, atol=1e-6, rtol=1e-6)


def test_beams(model):
    inputs = inputs_of(model, videos_per_row=(1, 1), before=(2, 5))
    compiled(model)
    both = new_tokens(model, inputs, num_beams=3, num_return_sequences=2)
    for row in range(2):
        alone = new_tokens(model, row_alone(inputs, row, (1, 1)), num_beams=3, num_return_sequences=2)
        assert torch.equal(alone, both[2 * row : 2 * row + 2])


@torch.no_grad()
def test_images_beside_videos_are_untouched_bit_for_bit(model):
    inputs = inputs_of(model, videos_per_row=(1, 1), images_per_row=(1, 0))
    own = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    images, seen = torch.cat(list(own)), []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    compiled(model, compile_llm=False)(**inputs)
    hook.remove()
    (embeddings,) = seen
    row = embeddings[0]
    starts = [place for place in range(len(row)) if torch.equal(row[place : place + len(images)], images)]
    assert len(starts) == 1


# --- Videos of every length ---------------------------------------------------------------------------


@pytest.mark.parametrize("way, encode_ratio", cases(("plus", 0.4), among=list(product(WAYS, [None, 0.4]))))
def test_one_graph_serves_every_length(pristine, way, encode_ratio):
    options = {**WAYS[way], **({} if encode_ratio is None else {"encode_ratio": encode_ratio})}
    compiled(pristine, **options)
    try:
        got = {}
        for frames in (5, 2, 9, 3, 16, 7):
            pixels = inputs_of(pristine, frames, seed=frames)["pixel_values_videos"]
            (rows,) = earlytom_compile.encode_videos(pristine, pixels)
            (told,) = report(pristine).to_dict()["videos"]
            got[frames] = rows, sum(told["patches"]["by_frame"])
        assert graphs_compiled() == 1 and report(pristine).to_dict()["graphs"] == 1
    finally:
        earlytom_compile.restore(pristine)
    for frames, (rows, computed) in got.items():
        inputs = inputs_of(pristine, frames, seed=frames)
        (expected,) = compressed_videos(pristine, inputs, **options)
        torch.testing.assert_close(rows, expected.features, atol=1e-5, rtol=1e-5)
        budget = None if encode_ratio is None else max(PLACES, round(encode_ratio * frames * PLACES))
        assert computed == sum(planned(inputs["pixel_values_videos"][0], budget=budget))


def test_videos_of_different_lengths_in_one_call(model):
    """In one row, in rows of their own, and a frame alone."""
    lengths = ((7, 1), (), (4,))
    rows, videos = [], []
    for number, frames in enumerate(lengths):
        ids = [3 + number, 5]
        for count in frames:
            videos.append(inputs_of(model, count, seed=count)["pixel_values_videos"][0])
            ids += [model.config.video_token_id] * (count * tokens_per_frame(model) + 1) + [7]
        rows.append(torch.tensor([*ids, 9]))
    width = max(map(len, rows))
    fill = [(width - len(row), 0) for row in rows]
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": torch.stack([pad(row, gap) for row, gap in zip(rows, fill, strict=True)]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), gap) for row, gap in zip(rows, fill, strict=True)]),
        "pixel_values_videos": videos,
    }
    together, waiting = new_tokens(compiled(model), batch), list(videos)
    assert [video["frames"] for video in report(model).to_dict()["videos"]] == [[7], [1], [4]]
    for row, frames, got in zip(rows, lengths, together, strict=True):
        alone = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        if frames:
            alone["pixel_values_videos"] = [waiting.pop(0) for _ in frames]
        assert torch.equal(new_tokens(model, alone)[0], got)


def test_a_video_encoded_once_answers_as_its_pixels_do(model):
    inputs = inputs_of(model, videos_per_row=(2, 0, 1), before=(1, 6, 3))
    expected = new_tokens(compiled(model), inputs)
    encoded = earlytom_compile.encode_videos(model, inputs.pop("pixel_values_videos"))
    told = report(model).to_dict()
    assert told["last_call"] == "encoded" and all("patches" in video for video in told["videos"])
    assert torch.equal(new_tokens(model, {**inputs, "pixel_values_videos": encoded}), expected)


# --- What is compiled -----------------------------------------------------------------------------------


def kinds_of(monkeypatch, layers, **options):
    """Pieces, and how many of them Inductor would be asked for."""
    lowered = []
    monkeypatch.setattr(stages, "lower", lambda graph, *args: lowered.append(graph) or graph.forward)
    model = compiled(tiny(vision_layers=layers), lowering="staged", compile_llm=False, **options)
    inputs = inputs_of(model)
    got = new_tokens(model, inputs)
    pieces, kinds = report(model).to_dict()["stages"]
    assert kinds == len(lowered)
    assert torch.equal(got, oracle_tokens(model, inputs, **options))
    return pieces, kinds


def test_a_deeper_encoder_has_more_pieces_but_no_more_to_compile(monkeypatch):
    pieces, kinds = kinds_of(monkeypatch, 4, full_layers=(2,))
    more, more_kinds = kinds_of(monkeypatch, 5, full_layers=(2, 4))
    assert more > pieces and more_kinds == kinds == 4, "embeddings, a packed layer, one in full, what follows"


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_inductor_serves_every_length(way):
    model = compiled(tiny(vision_layers=3), **WAYS[way], lowering="staged")
    lengths = {5: 0.3, 2: 0.0, 9: 1.0, 4: 0.1}
    got = []
    for frames, changing in lengths.items():
        got += earlytom_compile.encode_videos(model, inputs_of(model, frames, changing)["pixel_values_videos"])
    assert report(model).to_dict()["graphs"] == 1 and not report(model).to_dict()["reasons"]
    earlytom_compile.restore(model)
    for rows, (frames, changing) in zip(got, lengths.items(), strict=True):
        (expected,) = compressed_videos(model, inputs_of(model, frames, changing), **WAYS[way])
        torch.testing.assert_close(rows, expected.features, atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("way, lowering", list(product(WAYS, ["staged", "whole"])))
def test_inductor_gives_the_same_tokens(way, lowering):
    model, options = tiny(vision_layers=3), WAYS[way]
    inputs = inputs_of(model, videos_per_row=(1, 1), before=(1, 4))
    got = new_tokens(compiled(model, lowering=lowering, **options), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, **options))


def test_other_options_on_a_compiled_model(model):
    """From merging to reuse, to a budget and back."""
    inputs = inputs_of(model)
    for options in ({"reuse": False}, {}, {"encode_ratio": 0.5}, {"full_layers": ()}, {"reuse": False}):
        got = new_tokens(compiled(model, **options), inputs)
        (told,) = report(model).to_dict()["videos"]
        assert ("patches" in told) == (options.get("reuse") is None)
        assert torch.equal(got, oracle_tokens(model, inputs, **options))


@pytest.mark.long  # test_compiled_prompt.py copies a model, too
def test_a_copy_is_compiled_on_its_own(pristine):
    inputs = inputs_of(pristine)
    try:
        original = new_tokens(compiled(pristine), inputs)
        other = copy.deepcopy(pristine)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
        assert not torch.equal(new_tokens(other, inputs), original)
        assert torch.equal(new_tokens(pristine, inputs), original)
        earlytom_compile.restore(other)
    finally:
        earlytom_compile.restore(pristine)


# --- Threads and what is left behind ---------------------------------------------------------------------


@pytest.mark.long  # test_generation.py has threads that meet at the first call
def test_threads_with_videos_of_their_own(pristine):
    """Of all lengths, from the first call on, which compiles while the others wait."""
    calls = [inputs_of(pristine, frames, changing, seed=n) for n, (frames, changing) in enumerate(VIDEOS)]
    expected = [oracle_tokens(pristine, inputs) for inputs in calls]
    compiled(pristine)
    start = threading.Barrier(len(calls))

    def ask(inputs):
        start.wait()
        return [new_tokens(pristine, inputs) for _ in range(3)]

    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            for wanted, answers in zip(expected, pool.map(ask, calls), strict=True):
                assert all(torch.equal(tokens, wanted) for tokens in answers)
        assert report(pristine).to_dict()["graphs"] == 1
    finally:
        earlytom_compile.restore(pristine)


VIDEOS = ((6, 0.3), (4, 0.0), (9, 1.0), (6, 0.1))


def test_restore_undoes_it_exactly(model):
    inputs, before = inputs_of(model), dict(model.__dict__)
    with torch.no_grad():
        logits = model(**inputs).logits
    new_tokens(compiled(model), inputs)
    assert earlytom_compile.restore(model) is model and model.__dict__ == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("layout", [{"videos_per_row": (0,)}, {"videos_per_row": (0,), "images_per_row": (1,)}])
def test_calls_without_a_video_are_bit_for_bit_as_before(model, layout):
    inputs = inputs_of(model, **layout)
    with torch.no_grad():
        logits = model(**inputs).logits
        compiled(model)
        assert torch.equal(model(**inputs).logits, logits)
    assert report(model).to_dict()["graphs"] == 0


@pytest.mark.long  # test_placement.py has them
def test_weights_that_come_for_each_call(model):
    inputs = inputs_of(model)
    expected = oracle_tokens(model, inputs)
    placed = tiny()
    cpu_offload(placed, torch.device("cpu"))
    assert torch.equal(new_tokens(compiled(placed), inputs), expected)
    assert "patches" in report(placed).to_dict()["videos"][0]


# --- What the report says -----------------------------------------------------------------------------------


def test_the_report_says_what_was_computed(model):
    inputs = inputs_of(model, videos_per_row=(2,))
    inputs["pixel_values_videos"][1] = inputs["pixel_values_videos"][1, :1]
    compiled(model)
    before = report(model).to_dict()
    assert before["videos"] == [] and before["full_layers"] == []
    new_tokens(model, inputs)
    content = report(model).to_dict()
    assert content["full_layers"] == [2, 3] and content["merge_layers"] == []
    assert content["options"]["reuse"] is None and content["options"]["tau_reuse"] == 0.06
    names = ("plan_reuse", "pack_places", "take_places", "reuse_attention", "return_places")
    assert [content["inserted"][name] for name in names] == [1, 1, 1, 2, 1]
    assert not {"plan_merge", "merge_frames", "frame_similarity"} & content["inserted"].keys()
    moving, still = (video["patches"] for video in content["videos"])
    plan = plan_reuse(inputs["pixel_values_videos"][0], (GRID, GRID), (PATCH, PATCH), tau_reuse=0.06)
    assert moving["by_frame"] == tuple(plan.active.sum(1).tolist()) and moving["places"] == PLACES
    assert moving["noise"] == pytest.approx(plan.noise) and moving["threshold"] == pytest.approx(plan.threshold)
    assert still["by_frame"] == (PLACES, *[0] * (FRAMES - 1)) and still["changed"] == pytest.approx(1 / FRAMES)
    text, every = str(report(model)), FRAMES * PLACES
    assert "reuses patches but in layers 2, 3" in text and "merges after" not in text
    limit = f"(changed beyond {moving['threshold']:.3g})"
    assert f"patches {every} -> {plan.computed} {limit}, tokens" in text and f"patches {every} -> {PLACES} " in text


def test_the_report_says_that_nothing_was_reused(model):
    new_tokens(compiled(model), inputs_of(model, changing=1.0))
    (told,) = report(model).to_dict()["videos"]
    assert told["patches"]["by_frame"] == (PLACES,) * FRAMES and told["patches"]["changed"] == 1.0
    assert f"patches {FRAMES * PLACES} -> {FRAMES * PLACES} (nothing was reused)" in str(report(model))


def test_where_frames_merge_the_report_says_nothing_of_patches(model):
    new_tokens(compiled(model, reuse=False), inputs_of(model))
    content = report(model).to_dict()
    assert content["full_layers"] == [] and "patches" not in content["videos"][0]
    assert "patches" not in str(report(model)) and "merges after" in str(report(model))


# --- Errors and fallbacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_layers": (1, 4)}, r"full_layers=\(1, 4\): layer 4 does not exist; .* layers 0 to 3"),
        ({"merge_layers": (0,)}, "no frames merge"),
        ({"reuse": False, "encode_ratio": 0.5}, "without reuse"),
        ({"variant": "paper", "reuse": True, "merge_layers": (9,)}, "layer 9 does not exist"),
    ],
)
def test_bad_options_raise_at_compile_time_and_change_nothing(model, options, message):
    before = dict(model.__dict__)
    with pytest.raises(EarlyTomConfigError, match=message):
        earlytom_compile.compile(model, **{**PLUS, **options})
    assert model.__dict__ == before


@torch.no_grad()
def test_a_model_that_smooths_its_pixels_merges_frames_and_says_so(monkeypatch):
    """A place is then made of other pixels than those of its patch, and reuse would be wrong without a word."""
    leave_pieces_as_they_are(monkeypatch)
    model = tiny()
    embeddings = model.model.vision_tower.embeddings
    own = type(embeddings).forward
    smooth = torch.nn.AvgPool2d(3, 1, 1)
    monkeypatch.setattr(
        type(embeddings), "forward", lambda self, pixels, *args, **kwargs: own(self, smooth(pixels), *args, **kwargs)
    )
    inputs = inputs_of(model)
    logits = model(**inputs).logits
    compiled(model, strict=False, reuse=True)
    with pytest.warns(EarlyTomFallbackWarning, match="^running without .*not made of one patch .* reuse=False"):
        torch.testing.assert_close(model(**inputs).logits, logits)
    compiled(model, reuse=False)
    merged = model(**inputs).logits
    compiled(model)  # strict=True: it is compressed
    with pytest.warns(EarlyTomFallbackWarning, match="^frames merge, .*not made of one patch .* reuse=False"):
        assert torch.equal(model(**inputs).logits, merged)
    assert merged.shape[1] < logits.shape[1]
    said = str(earlytom_compile.report(model))
    assert "merges after" in said and "patches, so that frames merge: the" in said
    earlytom_compile.restore(model)
    with pytest.warns(EarlyTomFallbackWarning, match="^frames merge"):
        (seen,) = earlytom_compile.observe(model, inputs["pixel_values_videos"], **PLUS)
    assert seen.merges and seen.reuse is None and not seen.config.reuses()
    with pytest.warns(EarlyTomFallbackWarning, match="^frames merge"):
        program = earlytom_compile.export(model, frames=FRAMES, **PLUS)
    assert json.loads(program.graph_module.meta["earlytom"]["options"])["reuse"] is False
