"""Both ways to count: the paper's own totals, and torch's counter on a model that runs."""

import dataclasses

import pytest
import torch
from effort import cases
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from torch_counter import counter

import earlytom_compile
from earlytom_compile import EarlyTomConfigError
from earlytom_compile.backend import earlytom
from earlytom_compile.flops import count, implied_encoder, implied_frames, merged_inside
from earlytom_compile.kernels.attention_received import attention_received
from earlytom_compile.kernels.frame_similarity import frame_similarity
from earlytom_compile.kernels.keep_by_method import keep_by_method
from earlytom_compile.kernels.select_representatives import select_representatives
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Method
from earlytom_compile.shapes import SHAPES, LlavaShape, ModelShape, config_of, shape_of

BIG, SMALL, VIDEO = (shape_of(f"llava-{name}") for name in ("onevision-7b", "onevision-0.5b", "video-7b"))
TOKENS = 32 * 196
RATIOS = (0.25, 0.2, 0.15, 0.1)


def kept(ratio):
    return round(ratio * TOKENS)


def tera(shape, llm_tokens, frames=32):
    return count(shape, protocol="paper", frames_schedule=(frames,), llm_tokens=llm_tokens).total / 1e12


@pytest.mark.parametrize(
    "shape, llm_tokens, published",
    [
        (BIG, TOKENS, 82.6),
        (SMALL, TOKENS, 45.3),
        (BIG, {0: TOKENS, 2: 1254}, 51.1),  # FastV
        # VisionZip, and DyCoke at a quarter.
        (BIG, kept(0.25), 50.5),
        (BIG, kept(0.2), 48.7),
        (BIG, kept(0.15), 46.9),
        (BIG, kept(0.1), 45.2),
        (SMALL, kept(0.25), 42.4),
        (SMALL, kept(0.2), 42.3),
        (SMALL, kept(0.15), 42.1),
        (SMALL, kept(0.1), 42.0),
        # HoliTom
        (BIG, merged_inside(kept(0.2)), 47.5),
        (BIG, merged_inside(kept(0.15)), 46.0),
        (BIG, merged_inside(kept(0.1)), 44.6),
        (SMALL, merged_inside(kept(0.25)), 42.3),
        (SMALL, merged_inside(kept(0.2)), 42.2),
        (SMALL, merged_inside(kept(0.15)), 42.1),
        (SMALL, merged_inside(kept(0.1)), 42.0),
    ],
)
def test_the_papers_totals(shape, llm_tokens, published):
    assert round(tera(shape, llm_tokens), 1) == published


def test_the_papers_totals_of_llava_video():
    tokens = 64 * 196
    assert round(tera(VIDEO, tokens, frames=64), 1) == 246.2
    assert round(tera(VIDEO, round(0.15 * tokens), frames=64), 1) == 159.4  # VisionZip


def test_holitom_at_a_quarter_is_a_rounding_away():
    # The paper says 49.0; layer 18 and one half, which give its three other numbers, give 48.945.
    assert tera(BIG, merged_inside(kept(0.25))) == pytest.approx(49.0, abs=0.06)


def test_earlytoms_totals_of_both_models_imply_one_encoder():
    totals = {BIG: (36.5, 35.1, 33.6, 32.2), SMALL: (29.9, 29.8, 29.7, 29.6)}
    intervals = [
        implied_encoder(shape, [(1e12 * t, merged_inside(kept(r))) for r, t in zip(RATIOS, numbers, strict=True)])
        for shape, numbers in totals.items()
    ]
    least, most = max(low for low, _ in intervals), min(high for _, high in intervals)
    assert 29.4e12 < least < most < 29.45e12

    # Without merging inside the language model no encoder fits all four: so the paper counts it.
    with pytest.raises(EarlyTomConfigError, match="no encoder fits"):
        implied_encoder(BIG, [(1e12 * t, {0: kept(r)}) for r, t in zip(RATIOS, totals[BIG], strict=True)])


def test_implied_frames_are_what_whole_schedules_reach():
    # Any schedule of whole frames in the interval lies in the ranges, and the ranges are not much wider.
    encoder = (29.2e12, 29.6e12)
    implied = implied_frames(BIG, encoder, frames=32)
    found = [
        schedule
        for first in range(16, 33)
        for second in range(-(-first // 2), first + 1)
        for third in range(-(-second // 2), second + 1)
        for schedule in [(first, second, third)]
        if encoder[0] <= paper_encoder(32, *schedule) <= encoder[1]
    ]
    assert found
    for (low, high), whole in zip(implied.after_merge, zip(*found, strict=True), strict=True):
        assert low <= min(whole) <= low + 1.5 and high - 1.5 <= max(whole) <= high
    for frames, cost in zip(implied.every_layer, encoder, strict=True):
        assert paper_encoder(frames) == pytest.approx(cost)


def paper_encoder(*schedule):
    return count(BIG, protocol="paper", frames_schedule=schedule, llm_tokens=0).encoder


def test_an_impossible_total_is_refused():
    with pytest.raises(EarlyTomConfigError, match="no merging of 32 frames"):
        implied_frames(BIG, (50e12, 51e12), frames=32)
    with pytest.raises(EarlyTomConfigError, match="no merging of 32 frames"):
        implied_frames(BIG, (1e12, 2e12), frames=32)


@pytest.fixture(scope="module")
def tiny():
    # Wide enough beside its 13 patch tokens a side that every part of the count matters; 4 query heads, 2 key heads.
    sizes = {"vision_hidden": 48, "vision_intermediate": 200, "text_intermediate": 128}
    return tiny_llava_onevision(vision_layers=4, text_layers=1, **sizes)


def exact(model, schedule, length, **more):
    shape = ModelShape.from_config(model.config)
    return count(shape, protocol="exact", frames_schedule=schedule, llm_tokens=length, lm_head_positions=length, **more)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_exact_is_torchs_count_of_the_full_model(attention):
    model = tiny_llava_onevision(attn_implementation=attention, vision_intermediate=100)
    inputs = video_inputs(model, frames=8)
    with counter() as counted:
        model(**inputs)
    expected = exact(model, (8,), inputs["input_ids"].shape[1])
    assert expected.total == pytest.approx(counted.get_total_flops(), rel=0.01)
    modules = {
        name.split(".", 1)[1]: sum(ops.values()) for name, ops in counted.get_flop_counts().items() if "." in name
    }
    assert expected.encoder == pytest.approx(modules["model.vision_tower"], rel=1e-3)
    assert expected.projector == modules["model.multi_modal_projector"]
    assert expected.llm == pytest.approx(modules["model.language_model"], rel=0.01)
    assert expected.lm_head == modules["lm_head"]


@pytest.mark.parametrize("retain_ratio", cases((0.3,), among=[(0.1,), (0.3,)]))
@torch.no_grad()
def test_exact_is_torchs_count_of_the_compressed_model(tiny, retain_ratio):
    inputs = video_inputs(tiny, frames=16, scenes=2, drift=0.1)
    counts = []

    def counting(graph_module, example_inputs):
        # A counter around the call would keep Dynamo from compiling it.
        options = {"variant": "paper", "lowering": "eager", "retain_ratio": retain_ratio, "strict": True}
        compiled = earlytom(graph_module, example_inputs, options=options)

        def run(*args):
            with counter() as counted:
                result = compiled(*args)
            counts.append(counted.get_total_flops())
            return result

        return run

    torch.compile(tiny, backend=counting)(**inputs)
    report = earlytom_compile.report(tiny).to_dict()
    schedule, (before, after) = report["videos"][0]["frames"], report["prompt"]
    assert schedule[-1] < schedule[0] == 16 and after < before == inputs["input_ids"].shape[1]
    assert report["videos"][0]["tokens"] == [
        16 * tokens_per_frame(tiny),
        round(retain_ratio * 16 * tokens_per_frame(tiny)),
    ]

    expected = exact(tiny, schedule, after, merge_layers=report["merge_layers"])
    assert len(counts) == 1  # one graph
    # torch does not look into custom operators.
    assert expected.total - expected.operators == pytest.approx(counts[0], rel=0.01)


def test_operators_cost_what_torch_counts_inside_them():
    shape = ModelShape.from_config(tiny_llava_onevision(vision_layers=6).config)
    schedule, heads = (10, 9, 7, 6), shape.vision_heads
    with counter() as counted:
        for frames in schedule:
            hidden = torch.randn(frames, shape.frame_tokens, shape.vision_width)
            frame_similarity._init_fn(hidden, schedule[0] - 1)
        query, key = torch.randn(2, schedule[-2], heads, shape.frame_tokens, shape.vision_width // heads)
        attention_received._init_fn(query, key, 1.0)
    got = count(shape, protocol="exact", frames_schedule=schedule, llm_tokens=1, merge_layers=(0, 2, 4)).operators
    assert got == counted.get_total_flops()


@pytest.mark.parametrize("schedule", [(20, 20, 18, 17), (10, 8, 5, 3), (10, 9, 9, 8)])
def test_operators_of_plus_cost_what_torch_counts_inside_them(schedule):
    shape = ModelShape.from_config(tiny_llava_onevision(vision_layers=6).config)
    with counter() as counted:
        for frames in schedule[:-1]:
            frame_similarity._init_fn(torch.randn(frames, shape.frame_tokens, shape.vision_width), schedule[0] - 1)
        features = torch.randn(schedule[-1], shape.pooled_tokens, shape.llm_width)
        select_representatives._init_fn(features, torch.tensor(schedule[-1:]), 20)
    options = {"frames_schedule": schedule, "llm_tokens": 1, "merge_layers": (0, 2, 4), "variant": "plus"}
    assert count(shape, protocol="exact", **options).operators == counted.get_total_flops()
    assert count(shape, protocol="paper", **options).operators == 0


@pytest.mark.parametrize("frames, kept", [(10, 31), (3, 27), (8, 5)])
def test_operators_of_another_method_cost_what_torch_counts_inside_them(frames, kept):
    shape = ModelShape.from_config(tiny_llava_onevision(vision_layers=6).config)
    heads, width = shape.vision_heads, shape.vision_width // shape.vision_heads
    with counter() as counted:
        query, key = torch.randn(2, frames, heads, shape.frame_tokens, width)
        attention_received._init_fn(query, key, 1.0)
        features = torch.randn(frames, shape.pooled_tokens, shape.llm_width)
        importance, keys = features[..., 0], features[..., :width].contiguous()
        keep_by_method._init_fn(features, importance, keys, torch.tensor([frames]), kept, "visionzip")
    options = {"frames_schedule": (frames,), "llm_tokens": 1, "method": "visionzip", "kept": kept}
    assert count(shape, protocol="exact", **options).operators == counted.get_total_flops() > 0
    assert count(shape, protocol="paper", **options).operators == 0


def test_a_method_costs_what_it_asks_for(monkeypatch):
    plain = {"protocol": "exact", "frames_schedule": (32,), "llm_tokens": 665}
    whole = count(BIG, **plain)
    scores = 2 * 32 * 729**2 * 1152
    for asks, expected in (({}, 0), ({"importance": True}, scores), ({"keys": True}, 0)):
        for more, own in (
            ({}, 0),
            ({"operations": lambda sizes: sizes.kept * sizes.frames + sizes.key_width}, 627 * 32 + 72),
        ):
            mine = Method("mine", "none", keep=print, **asks, **more)
            monkeypatch.setattr(registry, "_registered", {"mine": mine})
            counted = count(BIG, **plain, method="mine", kept=627)
            assert counted.operators == expected + own
            assert counted.total - counted.operators == whole.total
    inside = Method("inside_only", "none", inside=lambda ratio, layers: ())
    monkeypatch.setattr(registry, "_registered", {"inside_only": inside})
    assert count(BIG, **plain, method="inside_only", kept=6272) == whole


def test_merging_frames_only_changes_what_comes_after():
    before = count(BIG, protocol="exact", frames_schedule=(32,), llm_tokens=665)
    after = count(BIG, protocol="exact", frames_schedule=(32, 32, 32, 16), llm_tokens=665)
    layer = (before.encoder - after.encoder) / 2  # layers 24 and 25
    assert layer == pytest.approx(before.encoder / 26 / 2, rel=0.01)
    assert after.projector == before.projector / 2 and after.llm == before.llm
    assert before.operators == 0 < after.operators < 0.01 * after.encoder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"protocol": "both"}, "'paper', 'exact'"),
        ({"variant": "more"}, "'paper', 'released', 'plus'"),
        ({"method": "more"}, "method='more': must be one of 'earlytom', "),
        ({"method": "visionzip"}, "kept=None with method='visionzip': must be the tokens .* from 1 to 6272, all"),
        ({"method": "visionzip", "kept": 0}, "kept=0 with method='visionzip'"),
        ({"method": "visionzip", "kept": 6273}, "kept=6273 with method='visionzip'"),
        ({"method": "visionzip", "kept": 9, "variant": "plus"}, "variant='plus' with method='visionzip'"),
        ({"method": "visionzip", "kept": 9, "frames_schedule": (32, 20)}, "32,20 with method='visionzip': no frames"),
        ({"frames_schedule": (32, 20)}, "must have one number, or 4"),
        ({"frames_schedule": (32, 20, 21, 10)}, "never grow"),
        ({"frames_schedule": (0,)}, "positive"),
        ({"frames_schedule": (32, 20), "merge_layers": (26,)}, "layer 26 does not exist"),
        ({"llm_tokens": {2: 10}}, "start at layer 0"),
        ({"llm_tokens": {0: 10, 29: 5}}, "up to 28"),
    ],
)
def test_what_cannot_be_counted_is_refused(changes, message):
    arguments = {"protocol": "paper", "frames_schedule": (32,), "llm_tokens": 100} | changes
    with pytest.raises(EarlyTomConfigError, match=message):
        count(BIG, **arguments)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if isinstance(shape, LlavaShape)])
def test_a_named_shape_and_its_config_say_the_same(name):
    config, shape = config_of(name), shape_of(name)
    assert ModelShape.from_config(config) == dataclasses.replace(shape, frames=32)
    assert max(config.image_token_id, config.video_token_id) < config.text_config.vocab_size
    tokens = {"cpu-small": (196, 49), "cpu-tiny": (36, 9)}.get(name, (729, 196))
    assert (shape.frame_tokens, shape.pooled_tokens) == tokens


def test_an_unknown_shape_names_those_there_are():
    with pytest.raises(EarlyTomConfigError, match="cpu-medium, cpu-small"):
        shape_of("llava-onevision-72b")


def test_a_model_whose_heads_do_not_fill_its_width_is_refused():
    config = config_of("cpu-small")
    config.text_config.head_dim = 32
    with pytest.raises(EarlyTomConfigError, match="head_dim=32"):
        ModelShape.from_config(config)
