"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 in place: tokens, logits and counts equal to those of the oracle."""

from itertools import product

import pytest
import torch
from effort import cases, examples
from generating import new_tokens
from hypothesis import given
from hypothesis import strategies as st
from oracle_qwen import compressed_rows
from qwen_calls import (
    EVERYTHING,
    PROMPTS,
    SMALL,
    WIDE,
    assert_as_the_oracle,
    compressing,
    counts_of,
    model_of,
    oracle_options,
    prompt_of,
    supported,
    twin_of,
)
from tiny_qwen import KINDS, PLAIN_KINDS, Clip, has_deepstack, qwen_inputs, row_alone
from torch.nn import functional as F
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import report, reporting

VARIANTS = ("paper", "released", "plus")


@pytest.fixture(scope="module", params=supported(PLAIN_KINDS, long=("qwen3_5",)))
def kind(request, sharing):
    yield request.param
    earlytom_compile.restore(model_of(request.param))
    reporting._RESTORED.clear()


with_windows_or_deepstack = pytest.mark.parametrize(
    "kind",
    [*supported(("qwen2_5_vl", "qwen3_vl")), pytest.param("qwen3_5", marks=pytest.mark.long)],
    indirect=True,
    scope="module",
)
"""Qwen3.5 has neither: its tower is Qwen3-VL's without DeepStack."""


# --- With the same options, which compile once ----------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt(kind, prompt):
    model = compressing(model_of(kind))
    assert_as_the_oracle(model, twin_of(kind), prompt_of(model, prompt))


@examples(12)
@given(
    frames=st.integers(2, 12),
    scenes=st.integers(1, 3),
    drift=st.sampled_from([0.05, 0.25, 0.6]),
    still=st.booleans(),
    grid=st.sampled_from([SMALL, WIDE]),
    seed=st.integers(0, 1000),
)
def test_any_video(kind, frames, scenes, drift, still, grid, seed):
    model, clip = compressing(model_of(kind)), Clip(frames, *grid, scenes=scenes, drift=drift, still=still)
    assert_as_the_oracle(model, twin_of(kind), qwen_inputs(model, [[2, clip, 3]], seed=seed), tokens=False)


@pytest.mark.parametrize(
    "clip",
    [
        Clip(1, *SMALL),
        pytest.param(Clip(9, 6, 14, scenes=2), marks=pytest.mark.long),
        Clip(9, 6, 6, scenes=2),  # a square whose side is no multiple of the patches of a token
        pytest.param(Clip(9, 2, 6), marks=pytest.mark.long),
        pytest.param(Clip(1, 2, 4), marks=pytest.mark.long),
        pytest.param(Clip(9, 16, 2), marks=pytest.mark.long),
    ],
    ids=lambda clip: "x".join(map(str, (clip.frames, clip.height, clip.width))),
)
@with_windows_or_deepstack
def test_sizes_that_compile_anew(kind, clip):
    model = compressing(model_of(kind))
    assert_as_the_oracle(model, twin_of(kind), qwen_inputs(model, [[2, clip, 3]]), tokens=False)


def test_each_row_equals_that_row_alone(kind):
    model = compressing(model_of(kind))
    inputs = prompt_of(model, "everything")
    together = new_tokens(model, inputs)
    for row in range(len(together)):
        assert torch.equal(new_tokens(model, row_alone(inputs, row))[0], together[row])


def test_images_beside_a_video_are_untouched_bit_for_bit(kind):
    model, twin = compressing(model_of(kind)), twin_of(kind)
    inputs = prompt_of(model, "everything")
    ids = {model: [ids for ids, _ in compressed_rows(twin, inputs, **oracle_options())], twin: inputs["input_ids"]}
    rows = {}

    def look(whose):
        def note(module, args, kwargs):
            length = kwargs["inputs_embeds"].shape[1]
            padded = torch.stack([F.pad(row, (length - len(row), 0)) for row in ids[whose]])
            pictures = padded == whose.config.image_token_id
            rows[whose] = [kwargs["inputs_embeds"][pictures]]
            if kwargs.get("deepstack_visual_embeds") is not None:
                among = pictures[kwargs["visual_pos_masks"]]
                rows[whose] += [states[among] for states in kwargs["deepstack_visual_embeds"]]

        return whose.model.language_model.register_forward_pre_hook(note, with_kwargs=True)

    for whose in (model, twin):
        hook = look(whose)
        with torch.no_grad():
            whose(**inputs)
        hook.remove()
    assert len(rows[twin]) == (4 if has_deepstack(twin) else 1) and len(rows[twin][0]) == 8 + 4
    assert all(map(torch.equal, rows[model], rows[twin]))


# --- With other options ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", cases(("padding",), among=[(prompt,) for prompt in PROMPTS]))
@pytest.mark.parametrize("variant", ["released", "plus"])
@with_windows_or_deepstack
def test_any_variant(kind, variant, prompt):
    model = compressing(model_of(kind), variant=variant)
    assert_as_the_oracle(model, twin_of(kind), prompt_of(model, prompt), variant=variant)


LAYERS = [(), (0,), (1,), (2,), (3,), (0, 3), (1, 3), (1, 2, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize(
    "merge_layers, variant",
    cases(
        ((1, 2, 3), "paper"), ((1,), "released"),
        among=list(product(LAYERS, VARIANTS)),
    ),
)  # fmt: skip
@with_windows_or_deepstack
def test_any_layers_merge(kind, merge_layers, variant):
    """Those of full attention and those of windows, before and behind those that reach the language model."""
    options = {"variant": variant, "merge_layers": merge_layers}
    model = compressing(model_of(kind), **options)
    inputs = qwen_inputs(model, [[3, Clip(9, *SMALL, scenes=2), 4]])
    assert_as_the_oracle(model, twin_of(kind), inputs, tokens=False, **options)


def test_the_layers_that_merge_by_default(kind):
    model = compressing(model_of(kind), merge_layers=None)
    inputs = prompt_of(model, "one video")
    new_tokens(model, inputs, max_new_tokens=1)
    layers = report(model).to_dict()["merge_layers"]
    assert layers
    assert_as_the_oracle(model, twin_of(kind), inputs, merge_layers=layers)


@pytest.mark.parametrize(
    "variant, retain_ratio",
    cases(
        ("plus", 0.07),
        among=list(product(("paper", "plus"), (0.001, 0.07, 0.5, 0.9, 1.0))),
    ),
)  # fmt: skip
@with_windows_or_deepstack
def test_exactly_so_many_tokens_are_kept(kind, variant, retain_ratio):
    model = compressing(model_of(kind), variant=variant, retain_ratio=retain_ratio)
    for frames, seed in product((3, 8, 11), (1, 2)):
        inputs = qwen_inputs(model, [[2, Clip(frames, *SMALL), 3]], seed=seed)
        new_tokens(model, inputs, max_new_tokens=1)
        assert [tokens[1] for _, tokens in counts_of(model)] == [max(1, round(retain_ratio * frames * 6))]


@pytest.mark.parametrize("max_window, frames", [(None, [132, 68, 35]), (200, [132, 67, 35])])
@with_windows_or_deepstack
def test_no_segment_is_longer_than_128_frames_unless_asked_for(kind, max_window, frames):
    """Of 132 equal frames, in segments of 128 and 4, or in one."""
    options = {"retain_ratio": 0.25, "max_window": max_window}
    model = compressing(model_of(kind), **options)
    inputs = qwen_inputs(model, [[2, Clip(132, *SMALL, still=True), 2]])
    assert_as_the_oracle(model, twin_of(kind), inputs, tokens=False, **options)
    assert counts_of(model) == [(frames, [132 * 6, 33 * 6])]


@pytest.mark.parametrize("merging", ["none is like another", "no layer"])
@with_windows_or_deepstack
def test_with_everything_kept_it_is_the_model_itself(kind, merging):
    twin, options = twin_of(kind), EVERYTHING if merging != "no layer" else {"retain_ratio": 1.0, "merge_layers": ()}
    model = compressing(model_of(kind), variant="plus" if merging == "no layer" else "paper", **options)
    inputs = prompt_of(model, "everything")
    with torch.no_grad():
        assert_close(model(**inputs).logits, twin(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(new_tokens(model, inputs), new_tokens(twin, inputs))
    assert all(tokens[0] == tokens[1] for _, tokens in counts_of(model))


@pytest.mark.parametrize("with_experts", supported(kind for kind in KINDS if kind not in PLAIN_KINDS))
def test_models_with_experts(with_experts, sharing):
    model = compressing(model_of(with_experts))
    assert_as_the_oracle(model, twin_of(with_experts), prompt_of(model, "an image beside"))
    earlytom_compile.restore(model)
