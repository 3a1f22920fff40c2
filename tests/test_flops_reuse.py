"""Work of an encoder that reuses unchanged patches: what torch counts while one runs, and the edges of what may be."""

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from scenes import standing_camera
from tiny_models import tiny_llava_onevision
from torch_counter import counter

import earlytom_compile
from earlytom_compile import EarlyTomConfigError
from earlytom_compile.backend import earlytom
from earlytom_compile.benchmarks.workload import make_inputs
from earlytom_compile.flops import Reuse, count, reuse_of
from earlytom_compile.kernels.attention_received import attention_received
from earlytom_compile.kernels.frame_similarity import frame_similarity
from earlytom_compile.shapes import ModelShape, shape_of

BIG = shape_of("llava-onevision-7b")
PATCHES = BIG.frame_tokens


def encoder(shape, reuse, frames=8, protocol="exact"):
    return count(shape, protocol=protocol, frames_schedule=(frames,), llm_tokens=9, variant="plus", reuse=reuse).encoder


def packed_layer(layer, hidden, rows, counts):
    """One layer of SigLIP on packed rows [T, D]: frame f has ``counts[f]`` queries, and keys ``rows[f]`` [S]."""
    attention = layer.self_attn
    heads, width = attention.num_heads, attention.head_dim

    def split(x):
        return x.view(len(x), heads, width).transpose(0, 1)

    x = layer.layer_norm1(hidden)
    query, key, value = (split(projection(x)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    parts, first = [], 0
    for own, places in zip(counts, rows, strict=True):
        scores = query[:, first : first + own] @ key[:, places].transpose(1, 2)
        parts.append(scores.softmax(-1) @ value[:, places])
        first += own
    hidden = hidden + attention.out_proj(torch.cat(parts, 1).transpose(0, 1).flatten(1))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


@torch.no_grad()
@pytest.mark.parametrize("full", [(), (2,), (0, 1, 2, 3)])
def test_exact_is_torchs_count_of_an_encoder_that_computes_some_places(full):
    model = tiny_llava_onevision(
        vision_layers=4, vision_hidden=48, vision_intermediate=200, attn_implementation="eager"
    )
    tower, shape = model.model.vision_tower, ModelShape.from_config(model.config)
    frames, places = 5, shape.frame_tokens
    active = torch.rand(frames, places, generator=torch.Generator().manual_seed(0)) < 0.3
    active[0] = True
    row = active.flatten().cumsum(0).view(frames, places) - 1
    rows = [row[: f + 1].where(active[: f + 1], -1).amax(0) for f in range(frames)]  # of the last frame that has it
    pixels = torch.randn(frames, 3, shape.image_size, shape.image_size)
    with counter() as counted:
        hidden = tower.embeddings(pixels)
        for number, layer in enumerate(tower.encoder.layers):
            if number in full:
                hidden = layer(hidden, attention_mask=None)
            else:
                packed_layer(layer, hidden[active], rows, active.sum(1).tolist())
    total = int(active.sum())
    assert places < total < frames * places
    assert encoder(shape, Reuse(total, full), frames) == counted.get_total_flops()


def reuse_attention_flops(query, key, value, rows, offsets, scale, *, out_shape=None):
    # Each packed query with the keys and values of all places of its frame.
    _, heads, total, width = query
    return 2 * heads * total * rows[1] * 2 * width


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.long), {"full_layers": ()}, {"full_layers": (0, 2), "encode_ratio": 0.5}],
)
def test_exact_is_torchs_count_of_the_compressed_model(options):
    """What the compiler makes of a model, whatever it reports to have computed."""
    model = tiny_llava_onevision(vision_layers=4, text_layers=1, vision_hidden=48, vision_intermediate=200)
    frames, side = 9, model.config.vision_config.image_size
    camera = standing_camera(frames, side, patch=4, changing=0.3, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(model, frames=frames, video=camera)
    counts = []

    def counting(graph_module, example_inputs):
        # A counter around the call would keep Dynamo from compiling it.
        given = {"lowering": "eager", "retain_ratio": 0.3, "strict": True, **options}
        compiled = earlytom(graph_module, example_inputs, options=given)

        def run(*args):
            with counter({torch.ops.earlytom.reuse_attention: reuse_attention_flops}) as counted:
                result = compiled(*args)
            counts.append(counted.get_total_flops())
            return result

        return run

    torch.compile(model, backend=counting)(**inputs)
    report = earlytom_compile.report(model).to_dict()
    (reuse,), (_, prompt) = reuse_of(report), report["prompt"]
    shape = ModelShape.from_config(model.config)
    assert shape.frame_tokens < reuse.computed < 0.7 * frames * shape.frame_tokens
    expected = count(
        shape, protocol="exact", frames_schedule=(frames,), llm_tokens=prompt, lm_head_positions=prompt,
        variant="plus", reuse=reuse,
    )  # fmt: skip
    # torch does not look into custom operators.
    assert len(counts) == 1 and expected.total - expected.operators == pytest.approx(counts[0], rel=0.002)


@pytest.mark.parametrize("protocol", ["paper", "exact"])
def test_everything_computed_is_the_full_encoder_and_shares_are_shares_of_layers(protocol):
    (whole,) = {encoder(BIG, reuse, protocol=protocol) for reuse in (None, Reuse(8 * PATCHES), Reuse(729, range(26)))}
    one, other = (encoder(BIG, Reuse(computed), protocol=protocol) for computed in (8 * PATCHES, 4 * PATCHES))
    embedding = 2 * 8 * PATCHES * 3 * 14**2 * BIG.vision_width if protocol == "exact" else 0
    assert other - embedding == pytest.approx((one - embedding) / 2)
    full = encoder(BIG, Reuse(4 * PATCHES, tuple(range(13))), protocol=protocol)
    assert full - embedding == pytest.approx(0.75 * (whole - embedding))


@examples(50)
@given(st.integers(1, 64), st.floats(0, 1), st.sets(st.integers(0, 25)), st.sampled_from(["paper", "exact"]))
def test_it_never_costs_more_than_all_nor_less_than_one_frame(frames, share, full, protocol):
    computed = PATCHES + round(share * (frames - 1) * PATCHES)
    cost = encoder(BIG, Reuse(computed, tuple(full)), frames, protocol)
    most, least = encoder(BIG, None, frames, protocol), encoder(BIG, None, 1, protocol)
    assert least * (1 - 1e-9) <= cost <= most * (1 + 1e-9)


def test_what_selects_is_counted_and_the_plan_multiplies_nothing():
    shape = ModelShape.from_config(tiny_llava_onevision(vision_layers=6).config)
    frames, heads = 7, shape.vision_heads
    given = {"protocol": "exact", "frames_schedule": (frames,), "llm_tokens": 1, "reuse": Reuse(shape.frame_tokens)}
    with counter() as counted:
        frame_similarity._init_fn(torch.randn(frames, shape.frame_tokens, shape.vision_width), frames - 1)
        query, key = torch.randn(2, frames, heads, shape.frame_tokens, shape.vision_width // heads)
        attention_received._init_fn(query, key, 1.0)
    assert count(shape, **given).operators == counted.get_total_flops()
    plus = 2 * frames**2 * shape.pooled_tokens**2 * shape.llm_width  # one window: each token with each
    assert count(shape, **given, variant="plus").operators == plus


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reuse": Reuse(728)}, "728 computed patches: must be from 729"),
        ({"reuse": Reuse(8 * 729 + 1)}, "5833 computed patches: must be from 729, those of the first frame, to 5832"),
        ({"reuse": Reuse(729, (26,))}, r"full_layers=\(26,\): layer 26 does not exist"),
        ({"reuse": Reuse(729), "frames_schedule": (8, 7, 6, 5)}, "frame schedule 8,7,6,5 with reuse"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(EarlyTomConfigError, match=message):
        count(BIG, **{"protocol": "exact", "frames_schedule": (8,), "llm_tokens": 100, **changes})
