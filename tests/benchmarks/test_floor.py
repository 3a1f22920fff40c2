"""The floor counts what runs: operations as torch counts them, bytes as the tensors have them."""

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llava_onevision, tokens_per_frame
from torch.utils.flop_counter import FlopCounterMode

from earlytom_compile.benchmarks.floor import Work, floor, work_of
from earlytom_compile.benchmarks.workload import make_inputs
from earlytom_compile.flops import Reuse
from earlytom_compile.integrations.caches import cache_of

WORDS = 9


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=4, text_layers=2)


def full(model, frames, rows=1):
    return work_of(model, schedules=[(frames,)] * rows, prompt=frames * tokens_per_frame(model) + 1 + WORDS)


def test_operations_are_those_torch_counts_but_for_the_half_that_causal_attention_leaves_out(model):
    inputs = make_inputs(model, frames=6, batch=2, prompt_length=WORDS)
    countable = tiny_llava_onevision(vision_layers=4, text_layers=2, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        countable(**inputs, logits_to_keep=1)
    text = model.config.text_config
    n = inputs["input_ids"].shape[1]
    left_out = sum(4 * text.hidden_size for key in range(n) for query in range(key))  # two products
    counted = sum(part.flops for part in full(model, 6, rows=2).values())
    assert counted == pytest.approx(counter.get_total_flops() - 2 * text.num_hidden_layers * left_out, rel=0.01)


def test_bytes_of_each_part_are_those_of_the_tensors_that_cross_its_borders(model):
    inputs = make_inputs(model, frames=6, batch=2, prompt_length=WORDS)
    seen = {"encoder": inputs["pixel_values_videos"].nbytes, "projector": 0, "llm": 0}

    def count_for(part):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            seen[part] += given.nbytes + (output[0] if isinstance(output, tuple) else output).nbytes

        return hook

    inner = model.model
    parts = [(layer, "encoder") for layer in inner.vision_tower.encoder.layers]
    parts += [(inner.multi_modal_projector, "projector")]
    parts += [(layer, "llm") for layer in inner.language_model.layers]
    hooks = [module.register_forward_hook(count_for(part), with_kwargs=True) for module, part in parts]
    with torch.no_grad():
        cache = cache_of(model(**inputs, logits_to_keep=1))
    for hook in hooks:
        hook.remove()
    seen["llm"] += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    stored = {"encoder": inner.vision_tower, "projector": inner.multi_modal_projector}
    stored["llm"] = inner.language_model.layers
    work = full(model, 6, rows=2)
    for part, module in stored.items():
        weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        assert work[part].bytes == weights + seen[part]
    assert work["lm_head"].bytes == model.lm_head.weight.nbytes


@examples(50)
@given(st.data(), st.floats(1e9, 1e15), st.floats(1e8, 1e13))
def test_fewer_frames_and_tokens_never_raise_the_floor(model, data, matmul, copy):
    more = data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=3).map(lambda x: sorted(x, reverse=True)))
    less = [data.draw(st.integers(1, count)) for count in more]
    less = sorted(less, reverse=True)
    less = [min(pair) for pair in zip(less, more, strict=True)]
    prompt = data.draw(st.integers(2, 500))
    shorter = data.draw(st.integers(1, prompt))
    rates = {"matmul": matmul, "copy": copy}
    high = floor(work_of(model, schedules=[more], prompt=prompt, merge_layers=(0, 2)), rates)
    low = floor(work_of(model, schedules=[less], prompt=shorter, merge_layers=(0, 2)), rates)
    assert low.seconds <= high.seconds and low.flops <= high.flops and low.bytes <= high.bytes
    assert high.seconds >= max(high.flops / matmul, high.bytes / copy) * (1 - 1e-12)


def test_each_part_waits_for_the_slower_of_arithmetic_and_memory():
    work = {"encoder": Work(10.0, 1.0), "llm": Work(1.0, 10.0)}
    result = floor(work, {"matmul": 2.0, "copy": 5.0})
    assert (result.flops, result.bytes, result.seconds, result.encoder_flops) == (11.0, 11.0, 5.0 + 2.0, 10.0)


def test_vision_has_less_to_do_where_frames_merge(model):
    merged = work_of(model, schedules=[(12, 8, 6)], prompt=100, merge_layers=(0, 2))
    whole = work_of(model, schedules=[(12,)], prompt=100)
    for part in ("encoder", "projector"):
        assert merged[part].flops < whole[part].flops and merged[part].bytes < whole[part].bytes
    assert merged["llm"] == whole["llm"] and whole["operators"] == Work(0, 0) != merged["operators"]


def test_a_layer_that_reuses_moves_and_multiplies_the_rows_that_it_computes(model):
    """Between all and one frame, in a straight line; layers in full are as they were."""
    places, prompt = 36, 50
    given = {"schedules": [(8,), (5,)], "prompt": prompt, "variant": "plus"}
    full = work_of(model, **given)["encoder"]
    every = work_of(model, **given, reuse=[Reuse(8 * places), Reuse(5 * places)])["encoder"]
    assert every == full
    one, two = (work_of(model, **given, reuse=[Reuse(rows + places), Reuse(places)])["encoder"] for rows in (10, 20))
    width = model.config.vision_config.hidden_size
    assert two.bytes - one.bytes == 4 * 10 * 2 * width * 4  # layers, rows, in and out, of 4 bytes
    in_full = work_of(model, **given, reuse=[Reuse(places, (0, 3)), Reuse(places, (0, 3))])["encoder"]
    assert in_full.bytes - work_of(model, **given, reuse=[Reuse(places)] * 2)["encoder"].bytes == (
        2 * (7 + 4) * places * 2 * width * 4
    )
    assert one.flops < two.flops < in_full.flops < full.flops
