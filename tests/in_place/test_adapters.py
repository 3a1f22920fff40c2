"""Adapters of PEFT on the vision tower, the projector and the language model: equal to a model with merged weights."""

import copy
from itertools import product

import pytest
import torch
from effort import cases
from generating import graphs_compiled, new_tokens, oracle_tokens
from oracle import compressed_forward, compressed_videos
from tiny_models import tiny_llava_onevision, video_inputs

import earlytom_compile

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

OPTIONS = {"variant": "paper", "merge_layers": (0, 1), "tau_seg": 0.3, "retain_ratio": 0.3}
TOWER = r".*vision_tower.*\.(q_proj|v_proj|fc1)"
PROJECTOR = r".*multi_modal_projector\.linear_\d"
LANGUAGE_MODEL = r".*language_model.*\.(q_proj|v_proj|down_proj)"
EVERYWHERE = f"{TOWER}|{PROJECTOR}|{LANGUAGE_MODEL}"


def tiny():
    return tiny_llava_onevision(vision_layers=3, text_layers=1)


def lora(where, **options):
    return peft.LoraConfig(target_modules=where, r=4, init_lora_weights=False, **options)


def adapted(config, model=None, name="default"):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny() if model is None else model, config, adapter_name=name).eval()


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", **OPTIONS, **options})


def merged(model, adapter="default"):
    """A model of its own without adapters, that has the weights of ``adapter``."""
    twin = copy.deepcopy(model)
    earlytom_compile.restore(twin.get_base_model())
    twin.set_adapter(adapter)
    return twin.merge_and_unload()


def rows(model, inputs):
    (encoded,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    return encoded


def check_rows(model, reference, inputs):
    """The compressed video of ``model`` is that of ``reference``, and not what it would be without adapters."""
    (expected,) = compressed_videos(reference, inputs, **OPTIONS)
    got = rows(model, inputs)
    torch.testing.assert_close(got, expected.features, atol=2e-5, rtol=1e-4)
    (plain,) = compressed_videos(tiny(), inputs, **OPTIONS)
    assert plain.features.shape != got.shape or (plain.features - got).abs().max() > 0.01
    assert earlytom_compile.report(model).to_dict()["videos"][0]["frames"][-1] < 8


def check(model, reference, inputs):
    check_rows(model, reference, inputs)
    tokens = oracle_tokens(reference, inputs, **OPTIONS)
    assert torch.equal(new_tokens(model, inputs), tokens)
    return tokens


def test_adapters_come_and_go_after_compile():
    """Added, chosen, disabled and merged while the model is compiled: every answer is that of the weights at hand."""
    model = compiled(tiny())
    inputs = video_inputs(model, 8)
    plain = new_tokens(model, inputs)
    wrapped = adapted(lora(EVERYWHERE), model, "one")
    wrapped.add_adapter("two", lora(EVERYWHERE))
    wrapped.eval()
    twins = {name: merged(wrapped, name) for name in ("one", "two")}
    answers = {}
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        answers[name] = check(model, twins[name], inputs)
        assert torch.equal(new_tokens(wrapped, inputs), answers[name])  # PEFT's generate() calls the model's
    with wrapped.disable_adapter():
        assert torch.equal(new_tokens(wrapped, inputs), plain)
    graphs = graphs_compiled()
    assert graphs == 4
    for name in ("one", "two", "one"):
        wrapped.set_adapter(name)
        assert torch.equal(new_tokens(wrapped, inputs), answers[name])
        with wrapped.disable_adapter():
            assert torch.equal(new_tokens(wrapped, inputs), plain)
    assert graphs_compiled() == graphs, "an adapter that was there before was compiled again"
    assert wrapped.merge_and_unload() is model
    assert torch.equal(new_tokens(model, inputs), answers["one"])
    assert len({tuple(tokens[0].tolist()) for tokens in (plain, *answers.values())}) == 3
    earlytom_compile.restore(model)


KINDS = {
    "LoRA": lambda: lora(f"{TOWER}|{PROJECTOR}"),
    "on some layers": lambda: lora(["q_proj", "v_proj", "fc1"], layers_to_transform=[1]),
    "whole modules": lambda: lora(TOWER, modules_to_save=["multi_modal_projector"]),
    "DoRA": lambda: lora(TOWER, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=TOWER, feedforward_modules=r".*fc1", init_ia3_weights=False),
    "OFT": lambda: peft.OFTConfig(target_modules=TOWER, oft_block_size=8, init_weights=False),
}
MORE_KINDS = {
    "LoHa": lambda: peft.LoHaConfig(target_modules=TOWER, r=4, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TOWER, r=4, init_weights=False),
    "HRA": lambda: peft.HRAConfig(target_modules=TOWER, r=4, init_weights=False),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TOWER, n_frequency=10, init_weights=False),
    "VeRA": lambda: peft.VeraConfig(target_modules=["out_proj", "fc1"], r=4, init_weights=False),
}


@pytest.mark.parametrize("kind", cases(("whole modules",), among=[(kind,) for kind in KINDS]))
def test_kinds(kind):
    check_kind(KINDS[kind]())


@pytest.mark.long
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_more_kinds(kind):
    check_kind(MORE_KINDS[kind]())


def check_kind(config):
    wrapped = adapted(config)
    reference, model = merged(wrapped), wrapped.get_base_model()
    check_rows(compiled(model), reference, video_inputs(model, 8))


@pytest.mark.long
def test_through_inductor():
    """Layers with and without an adapter are compiled apart, and the prompt's pass has its adapters too."""
    wrapped = adapted(lora(["q_proj", "down_proj"], layers_to_transform=[0]))
    reference, model = merged(wrapped), wrapped.get_base_model()
    inputs = video_inputs(model, 8)
    check(compiled(model, lowering="staged"), reference, inputs)
    with wrapped.disable_adapter():
        assert torch.equal(new_tokens(wrapped, inputs), oracle_tokens(tiny(), inputs, **OPTIONS))


REUSE = {"variant": "plus", "retain_ratio": 0.3, "full_layers": (2,)}


@pytest.mark.parametrize(
    "kind, lowering",
    cases(("DoRA", "eager"), among=list(product(["LoRA", "DoRA", "on some layers"], ["eager", "staged"]))),
)
def test_with_patches_reused(kind, lowering):
    """On layers that compute some of the places, on those that compute all, and on the projector behind them."""
    wrapped = adapted(KINDS[kind]())
    reference, model = merged(wrapped), wrapped.get_base_model()
    inputs = video_inputs(model, 6, changing=0.3)
    earlytom_compile.compile(model, strict=True, lowering=lowering, **REUSE)
    got = rows(model, inputs)
    (told,) = earlytom_compile.report(model).to_dict()["videos"]
    assert 36 < sum(told["patches"]["by_frame"]) < 6 * 36
    (expected,), (plain,) = (compressed_videos(each, inputs, **REUSE) for each in (reference, tiny()))
    torch.testing.assert_close(got, expected.features, atol=2e-5, rtol=1e-4)
    assert (plain.features - got).abs().max() > 0.01
    with wrapped.disable_adapter():
        torch.testing.assert_close(rows(model, inputs), plain.features, atol=2e-5, rtol=1e-4)


@pytest.mark.long
def test_torch_compile_of_the_wrapper():
    wrapped = adapted(lora(EVERYWHERE))
    reference, inputs = merged(wrapped), video_inputs(wrapped.get_base_model(), 8)
    fast = torch.compile(wrapped, backend="earlytom", options={"lowering": "eager", **OPTIONS})
    expected = compressed_forward(reference, inputs, **OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_the_wrapper_itself_is_no_model_of_ours():
    with pytest.raises(earlytom_compile.EarlyTomConfigError, match=r"PeftModel.*inside \(.get_base_model\(\)\)"):
        compiled(adapted(lora(PROJECTOR)))
