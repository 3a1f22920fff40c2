"""Whatever attention a model is loaded with, its videos are compressed; for all else it is the user's."""

import sys
import types
from collections import Counter

import pytest
import torch
from effort import cases
from generating import OPTIONS, compiled, new_tokens, oracle_tokens
from oracle import compressed_videos
from tiny_models import tiny_llava_onevision, video_inputs
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import report

CALLS = Counter()
SIZE = {"vision_layers": 4, "text_layers": 1}


@torch.library.custom_op("earlytom_test::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale)


@attention.register_fake
def _(q, k, v, scale):
    return torch.empty_like(q)


def through_an_operator(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    CALLS["operator"] += 1
    return torch.ops.earlytom_test.attention(query, key, value, float(scaling)).transpose(1, 2).contiguous(), None


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    """[B, S, H, D], as the packages of flash attention have it; breaks every graph, as they do."""
    CALLS["flash"] += 1
    assert q.abs().max().item() < 1e9
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = causal and q.shape[2] > 1
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


@pytest.fixture(autouse=True)
def attentions(monkeypatch):
    """Stand-ins for packages that need a GPU, where transformers imports them."""
    CALLS.clear()
    AttentionInterface.register("earlytom_test_operator", through_an_operator)
    package = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_func}
    package["flash_attn_with_kvcache"] = flash_attn_func
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.bert_padding"):
        module = types.ModuleType(name)
        vars(module).update(package, pad_input=None, unpad_input=None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    yield
    AttentionInterface._global_mapping.pop("earlytom_test_operator")


def tiny(tower, text="sdpa"):
    """Set as ``from_pretrained`` sets it, without the checks that ask for a GPU."""
    model = tiny_llava_onevision(**SIZE)
    model.config.vision_config._attn_implementation = tower
    model.config.text_config._attn_implementation = text
    return model


@pytest.fixture(scope="module")
def wanted():
    """Tokens and the logits of a prompt with a video under SDPA."""
    model = compiled(tiny_llava_onevision(**SIZE))
    inputs = video_inputs(model, 12, images_per_row=(1,))
    with torch.no_grad():
        return inputs, new_tokens(model, inputs), model(**inputs).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "tower",
    cases(("flash_attention_3",), among=[("earlytom_test_operator",), ("flash_attention_2",), ("flash_attention_3",)]),
)
def test_videos_are_compressed_as_under_sdpa_and_images_have_the_own_attention(tower, wanted):
    inputs, tokens, logits = wanted
    model = compiled(tiny(tower))
    assert torch.equal(new_tokens(model, inputs), tokens)
    torch.testing.assert_close(model(**inputs).logits, logits)
    content = report(model).to_dict()
    assert (content["graphs"], content["recompiles"], content["last_call"]) == (1, 0, "compressed")
    assert f"with sdpa in place of {tower}" in content["compilations"][0]["cause"]
    assert sum(CALLS.values()) == 2 * 4, "the image went through the own attention in 4 layers, twice"
    assert model.model.vision_tower.config._attn_implementation == tower
    earlytom_compile.restore(model)
    CALLS.clear()
    model(**inputs)
    assert sum(CALLS.values()) == 2 * 4, "the video too"


@torch.no_grad()
def test_flex_attention():
    """Without images, for which transformers would compile it."""
    inputs = video_inputs(tiny("sdpa"), 12)
    got = new_tokens(compiled(tiny("flex_attention")), inputs)
    assert torch.equal(got, oracle_tokens(tiny("sdpa"), inputs))


def test_other_compilers_trace_the_attention_that_was_chosen():
    model = compiled(tiny("earlytom_test_operator"))  # transformers is prepared
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compile(model.model.vision_tower.encoder.layers[0], backend=keep)(torch.rand(1, 36, 32), None)
    assert any("earlytom_test" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@torch.no_grad()
def test_an_attention_changed_later_is_seen(wanted):
    inputs, tokens, _ = wanted
    model = compiled(tiny("eager"))
    assert torch.equal(new_tokens(model, inputs), tokens)
    model.config.vision_config._attn_implementation = "flash_attention_2"
    assert torch.equal(new_tokens(model, inputs), tokens)
    assert report(model).last_call == "compressed"
    assert CALLS["flash"] == 4, "the image"


def test_observing_a_tower_in_flash_attention(wanted):
    inputs = wanted[0]
    (oracle,) = compressed_videos(tiny("sdpa"), inputs, **OPTIONS)
    (observed,) = earlytom_compile.observe(tiny("flash_attention_2"), inputs["pixel_values_videos"], **OPTIONS)
    width = observed.grid[1]
    assert [[frame, row * width + column] for frame, row, column in observed.kept] == oracle.kept.tolist()
    assert list(observed.frame_counts[1:]) == list(oracle.frames_after)
    assert not CALLS


@torch.no_grad()
def test_a_language_model_whose_attention_breaks_graphs_runs_as_it_is(wanted, monkeypatch):
    leave_pieces_as_they_are(monkeypatch)
    inputs, tokens, _ = wanted
    model = compiled(tiny("flash_attention_2", "flash_attention_2"), lowering="staged")
    assert torch.equal(new_tokens(model, inputs), tokens)
    content = report(model).to_dict()
    assert [compilation["part"] for compilation in content["compilations"]] == ["video"]
    (reason,) = content["reasons"]
    assert reason.endswith("prompt is not compiled: its attention is flash_attention_2")
