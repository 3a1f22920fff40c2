"""Reuse: what a layer computes, attends to, and hands on."""

import brute_force_reuse
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from pixel_strategies import budgets, places_of, reuse_arguments
from plain_blocks import HEADS, encoder, states
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import (
    encode_with_reuse,
    importance_with_reuse,
    plan_reuse,
    read_sources,
    share_updates,
)

some = examples(40)


@st.composite
def encodings(draw):
    """(hidden [F, S, D] that has nothing to do with the pixels, layers, source [F, S], full layers)."""
    arguments = draw(reuse_arguments())
    source = plan_reuse(**arguments, budget=draw(budgets(arguments))).source
    layers = encoder(draw(st.integers(1, 4)), places_of(arguments), draw(st.integers(0, 99)))
    full_layers = draw(st.sets(st.integers(0, len(layers) - 1), max_size=2))
    return states(*source.shape, seed=draw(st.integers(0, 99))), layers, source, full_layers


def own(frames: int, places: int) -> Tensor:
    return torch.arange(frames)[:, None].expand(frames, places)


def close(a: Tensor, b: Tensor) -> None:
    """In float64, to what rounding leaves behind a few layers."""
    torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


# --- All of it ------------------------------------------------------------------------------------


@some
@given(encodings())
def test_packed_rows_that_telescope_give_the_same(encoding):
    """Active rows alone, packed; several layers in a row; what they changed is handed on once, behind the last."""
    hidden, layers, source, full_layers = encoding
    left = encode_with_reuse(hidden, layers, source, full_layers=full_layers)
    close(left[-1], brute_force_reuse.packed_encoder(hidden, layers, source, full_layers))


@some
@given(encodings())
def test_every_layer_leaves_its_states(encoding):
    hidden, layers, source, full_layers = encoding
    left = encode_with_reuse(hidden, layers, source, full_layers=full_layers)
    assert len(left) == len(layers) + 1 and torch.equal(left[0], hidden)
    for count in range(len(layers)):
        fewer = encode_with_reuse(hidden, layers[:count], source, full_layers={i for i in full_layers if i < count})
        assert torch.equal(fewer[-1], left[count])


# --- Where it is the plain encoder ----------------------------------------------------------------


@pytest.mark.parametrize("full_layers", [(), (0, 2)])
def test_with_everything_active_it_is_the_plain_encoder(full_layers):
    hidden, layers = states(4, 5), encoder(3, 5)
    plain = hidden
    for layer in layers:
        plain = layer(plain)
    assert torch.equal(encode_with_reuse(hidden, layers, own(4, 5), full_layers=full_layers)[-1], plain)


def test_with_every_layer_in_full_it_is_the_plain_encoder():
    hidden, layers = states(4, 5), encoder(3, 5)
    plain = hidden
    for layer in layers:
        plain = layer(plain)
    still = torch.zeros(4, 5, dtype=torch.int64)
    assert torch.equal(encode_with_reuse(hidden, layers, still, full_layers=range(3))[-1], plain)


@pytest.mark.parametrize("full_layers", [(), (1,)])
def test_a_still_video_is_the_result_of_its_frame(full_layers):
    frame, layers = states(1, 5), encoder(3, 5)
    still = torch.zeros(4, 5, dtype=torch.int64)
    left = encode_with_reuse(frame.expand(4, -1, -1), layers, still, full_layers=full_layers)[-1]
    close(left, encode_with_reuse(frame, layers, still[:1])[-1].expand(4, -1, -1))


@some
@given(encodings())
def test_the_first_frame_is_always_that_of_the_plain_encoder(encoding):
    hidden, layers, source, full_layers = encoding
    plain = hidden[:1]
    for layer in layers:
        plain = layer(plain)
    close(encode_with_reuse(hidden, layers, source, full_layers=full_layers)[-1][:1], plain)


# --- What is handed on ----------------------------------------------------------------------------


@some
@given(encodings())
def test_an_inactive_place_keeps_what_its_own_state_differs_by(encoding):
    """Without full layers: its state behind the last layer minus its source's is what it was before the first."""
    hidden, layers, source, _ = encoding
    left = encode_with_reuse(hidden, layers, source)[-1]
    close(left - read_sources(left, source), hidden - read_sources(hidden, source))


@some
@given(encodings(), st.data())
def test_nobody_reads_an_inactive_place(encoding, data):
    hidden, layers, source, _ = encoding
    inactive = (source != own(*source.shape)).nonzero().tolist()
    if not inactive:
        return
    f, s = data.draw(st.sampled_from(inactive))
    other = hidden.clone()
    other[f, s] += 1.0
    before, after = (encode_with_reuse(each, layers, source)[-1] for each in (hidden, other))
    close(after[f, s], before[f, s] + 1.0)
    after[f, s] = before[f, s]
    assert torch.equal(after, before)


def test_an_active_place_sees_the_sources_of_the_others():
    """One layer, worked out by hand for one place: frame 2 reads place 0 from frame 1 and place 2 from frame 0."""
    source = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 2, 0]])
    hidden, (layer,) = states(3, 3), encoder(1, 3)
    seen = torch.stack([hidden[1, 0], hidden[2, 1], hidden[0, 2]])
    assert torch.equal(read_sources(hidden, source)[2], seen)
    left = encode_with_reuse(hidden, [layer], source)[-1]
    close(left[2, 1], layer(seen[None])[0, 1])
    close(left[2, 0], hidden[2, 0] + left[1, 0] - hidden[1, 0])
    close(left[2, 2], hidden[2, 2] + left[0, 2] - hidden[0, 2])


def test_a_full_layer_lets_context_reach_still_places():
    """Place 1 is still, place 0 has other content in frame 1. Reused, place 1 does not come to know; in a full layer
    it does, in the first as in the last."""
    hidden, layers = states(2, 2), encoder(3, 2)
    hidden[1, 1] = hidden[0, 1]
    source = torch.tensor([[0, 0], [1, 0]])
    left = encode_with_reuse(hidden, layers, source)[-1]
    close(left[1, 1], left[0, 1])
    for index in range(3):
        left = encode_with_reuse(hidden, layers, source, full_layers=(index,))[-1]
        assert (left[1, 1] - left[0, 1]).abs().max() > 0.05
    plain = encode_with_reuse(hidden, layers, own(2, 2))[-1]
    last = encode_with_reuse(hidden, layers, source, full_layers=(2,))[-1]
    reused = encode_with_reuse(hidden, layers, source)[-1]
    assert (last - plain)[1, 1].norm() < (reused - plain)[1, 1].norm()


@pytest.mark.parametrize(("dtype", "output"), [(torch.bfloat16, 258.0), (torch.float16, 2050.0)])
def test_states_keep_their_dtype_and_updates_are_added_in_float32(dtype, output):
    """The update, output - 1, is no number of that dtype; rounded to one, 1 + it would not be the output."""
    hidden, computed = torch.ones(2, 1, 1, dtype=dtype), torch.full((2, 1, 1), output, dtype=dtype)
    computed[1] = 0.0
    left = share_updates(hidden, computed, torch.tensor([[0], [0]]))
    assert left.dtype == dtype and left.flatten().tolist() == [output, output]


# --- Importance -----------------------------------------------------------------------------------


@some
@given(encodings())
def test_importance_is_that_of_every_place_asking_with_its_source_s_query(encoding):
    hidden, layers, source, _ = encoding
    query, key, _ = layers[0].project(hidden, torch.arange(hidden.shape[1]))
    received = importance_with_reuse(query, key, source, scale=0.7)
    frames, places = source.shape
    for f in range(frames):
        total = torch.zeros(places)
        for s in range(places):
            for head in range(HEADS):
                asks = query[source[f, s], s, head].float()
                asked = torch.stack([key[source[f, t], t, head] for t in range(places)]).float()
                total += (asked @ asks * 0.7).softmax(0)
        torch.testing.assert_close(received[f], total / (HEADS * places), atol=1e-6, rtol=0)
    torch.testing.assert_close(received.sum(-1), torch.ones(frames))


# --- Bad input ------------------------------------------------------------------------------------

SOURCE = torch.tensor([[0, 0], [1, 0], [1, 2]])
BAD_SOURCES = {
    "another number of places": SOURCE[:, :1],
    "another number of frames": SOURCE[:2],
    "nothing in the first frame": SOURCE + 1,
    "not the frame before's": torch.tensor([[0, 0], [1, 0], [0, 2]]),
    "the future": torch.tensor([[0, 0], [2, 0], [2, 2]]),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_sources_that_no_plan_has_are_errors(name):
    hidden, layers = states(3, 2), encoder(1, 2)
    encode_with_reuse(hidden, layers, SOURCE)
    for call in (
        lambda source: encode_with_reuse(hidden, layers, source),
        lambda source: read_sources(hidden, source),
        lambda source: share_updates(hidden, hidden, source),
    ):
        with pytest.raises(EarlyTomConfigError, match="source has shape"):
            call(BAD_SOURCES[name])


def test_layers_that_do_not_exist_and_other_states_are_errors():
    hidden, layers = states(3, 2), encoder(2, 2)
    with pytest.raises(EarlyTomConfigError, match="full_layers=.*layers 0 to 1"):
        encode_with_reuse(hidden, layers, SOURCE, full_layers=(2,))
    for bad in (hidden[0], hidden[:, :0], hidden.long()):
        with pytest.raises(EarlyTomConfigError, match="hidden has shape"):
            encode_with_reuse(bad, layers, SOURCE)
