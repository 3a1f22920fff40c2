"""The real LLaVA-OneVision graph, with sizes that collide: fewer frames and a shorter prompt, against the model."""

import pytest
import torch
import transformers.models.llava_onevision.modeling_llava_onevision as modeling
from effort import cases
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from torch.testing import assert_close
from tracing import Traced, shrink, trace
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from earlytom_compile.passes.axes import AxisMap
from earlytom_compile.passes.retarget_axes import ResizedAxis, retarget_axes

SMALL = {"vision_layers": 2, "vision_hidden": 16, "vision_heads": 4, "image_size": 16, "text_layers": 1}
"""16 encoder tokens and 4 pooled tokens a frame; 4 heads of size 4."""


def trace_model(model, inputs: dict, dynamic: bool | None, monkeypatch) -> Traced:
    """One graph, as the backend gets it: output hooks installed before, the placeholder count not checked."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)
    monkeypatch.setattr(modeling, "torch_compilable_check", lambda *_, **__: None)
    return trace(lambda **kwargs: model(**kwargs, use_cache=False).logits, dynamic=dynamic, **inputs)


def cut_prompt(traced: Traced, to: int, as_node: bool) -> list[ResizedAxis]:
    first = shrink(traced, traced.node("input_ids"), 1, to, "prompt", as_node)
    second = shrink(traced, traced.node("attention_mask"), 1, to)
    return [first, ResizedAxis(second.node, 1, "prompt", first.size)]


@pytest.mark.parametrize(
    ("rows", "length", "attention", "dynamic"),
    cases(
        (4, 4, "sdpa", True),
        among=[(1, 12, "sdpa", None), (2, 48, "eager", None), (4, 4, "sdpa", True), (12, 12, "eager", True)],
    ),
)
def test_text_prompt(rows, length, attention, dynamic, monkeypatch):
    """Prompt lengths equal to the batch, the heads (4), head sizes (12), key sizes (24) and the hidden size (48)."""
    model = tiny_llava_onevision(**SMALL, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :1] = 0
    traced = trace_model(model, {"input_ids": ids, "attention_mask": mask}, dynamic, monkeypatch)
    axes = AxisMap.infer(traced.module)
    assert not [obstacle for obstacle in axes.obstacles if "no axis rule" in obstacle.why]
    inputs = [node.name for node, _ in axes.members(traced.node("input_ids"), 1) if node.op == "placeholder"]
    assert len(inputs) == 2 and "attention_mask" in inputs[1]
    to = length // 2 + 1
    retarget_axes(traced.module, cut_prompt(traced, to, as_node=rows > 2))
    with torch.no_grad():
        expected = model(input_ids=ids[:, :to], attention_mask=mask[:, :to]).logits
    assert_close(traced.run(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "dynamic"),
    [
        # heads, head size, pooled tokens; a prompt of 4 * 4 + 1 + 31 tokens, as long as the hidden size
        ({"frames": 4, "after": 31}, None),
        ({"frames": 16}, True),  # vision hidden size, encoder tokens, and the symbol of the image size
    ],
    ids=str,
)
def test_video(sizes, dynamic, monkeypatch):
    """Frames are encoded one by one, so that cutting the last ones inside the encoder is giving fewer frames."""
    sizes = dict(sizes)
    frames, after = sizes.pop("frames"), sizes.pop("after", 11)
    model = tiny_llava_onevision(**{**SMALL, **sizes})
    inputs = video_inputs(model, frames, before=0, after=after)
    traced = trace_model(model, inputs, dynamic, monkeypatch)
    to = frames - 2
    dropped = 2 * tokens_per_frame(model)
    length = inputs["input_ids"].shape[1] - dropped
    layer = traced.called("layer_norm")[2].args[0]  # what the second encoder layer reads
    axes = [shrink(traced, layer, 0, to, "frames", as_node=True)]
    for name in ("input_ids", "attention_mask"):
        axis = shrink(traced, traced.node(name), 1, length, "prompt")
        axis.node.args = (axis.node.args[0], 1, dropped, length)  # the prompt loses what it begins with
        axes.append(axis)
    retarget_axes(traced.module, axes)
    assert "sym_size" in traced.code()
    fewer = {
        "input_ids": inputs["input_ids"][:, dropped:],
        "attention_mask": inputs["attention_mask"][:, dropped:],
        "pixel_values_videos": inputs["pixel_values_videos"][:, :to],
    }
    with torch.no_grad():
        assert_close(traced.run(), model(**fewer).logits, rtol=1e-5, atol=1e-5)


def test_what_is_on_the_prompt_axis(monkeypatch):
    """A prompt as long as the hidden size, the head size and the number of heads: data flow tells them apart."""
    model = tiny_llava_onevision(**SMALL, text_hidden=48, text_heads=4)
    ids = torch.arange(48)[None] + 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    traced = trace_model(model, inputs, None, monkeypatch)
    axes = AxisMap.infer(traced.module)
    prompt = (traced.node("input_ids"), 1)
    on_axis = {(node.op, i, len(axes.values[node].dims)) for node, i in axes.members(*prompt)}
    query = next(n for n in traced.called("scaled_dot_product_attention")).args[0]
    mask = next(n for n in traced.called("scaled_dot_product_attention")).kwargs["attn_mask"]
    assert ("placeholder", 1, 2) in on_axis
    assert axes.same(prompt, (query, 2)) and not any(axes.same(prompt, (query, i)) for i in (0, 1, 3))
    assert axes.same(prompt, (mask, 2)) and axes.same(prompt, (mask, 3))
    for wave in (*traced.called("cos"), *traced.called("sin")):
        assert axes.same(prompt, (wave, 1)) and axes.same((wave, 2), (query, 3))
    for product in traced.called("linear"):
        assert axes.same(prompt, (product, 1)) and not axes.same(prompt, (product, 2))
    counting = [n for n in traced.called("arange") if axes.same(prompt, (n, 0))]
    assert len(counting) == 3
