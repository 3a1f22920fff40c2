"""Hooks, placement and weights that change: each works, or is refused by name."""

import copy
from itertools import product

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from effort import cases
from generating import OPTIONS, compiled, graphs_compiled, new_tokens, oracle_tokens
from oracle import compressed_forward, compressed_videos
from tiny_models import tiny_llava_onevision, video_inputs
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.integrations import video_encoder

ON_CPU = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.image_newline"), "cpu")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LANGUAGE_ON_CPU = dict.fromkeys(("model.language_model", "lm_head"), "cpu")


def tiny(**options):
    return tiny_llava_onevision(**{"vision_layers": 4, "text_layers": 1, **options})


@pytest.fixture(scope="module")
def inputs():
    return video_inputs(tiny(), 12)


@pytest.fixture(scope="module")
def wanted(inputs):
    model = compiled(tiny())
    with torch.no_grad():
        return new_tokens(model, inputs), model(**inputs).logits


def oracle_logits(model, inputs):
    earlytom_compile.restore(model)
    return compressed_forward(model, inputs, **OPTIONS).logits


def mlp(model, layer=1):
    return model.model.vision_tower.encoder.layers[layer].mlp


def dispatched(device_map):
    def place(model, folder):
        dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)

    return place


PLACED = {
    "one device": dispatched({"": "cpu"}),
    "tower on disk": dispatched({**ON_CPU, **LANGUAGE_ON_CPU, "model.vision_tower": "disk"}),
    "language model on disk": dispatched({**ON_CPU, "model.language_model": "disk", "lm_head": "disk"}),
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # parameters outside of submodules
@pytest.mark.parametrize(
    "placed, when",
    cases(
        ("tower on disk", "before"),
        among=list(product(PLACED, ["before", "after the first call"])),
    ),
)  # fmt: skip
def test_models_that_accelerate_has_placed_compress(placed, when, inputs, wanted, tmp_path):
    model = tiny()
    if when == "before":
        PLACED[placed](model, tmp_path)
    compiled(model)
    if when != "before":
        new_tokens(model, inputs)
        PLACED[placed](model, tmp_path)
    weights = [parameter.device for parameter in model.parameters()]
    before = graphs_compiled()
    for _ in range(3):
        assert torch.equal(new_tokens(model, inputs), wanted[0])
    torch.testing.assert_close(model(**inputs).logits, wanted[1])
    assert graphs_compiled() - before == 1
    content = report(model).to_dict()
    assert content["encoder"]["layers"] == 4
    assert content["last_call"] == "compressed"
    assert [parameter.device for parameter in model.parameters()] == weights, "offloaded as before"
    earlytom_compile.restore(model)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1], "the model's own"


@pytest.mark.long
@torch.no_grad()
def test_hooks_of_accelerate_that_go_again(inputs, wanted):
    model = compiled(tiny())
    cpu_offload(model, torch.device("cpu"))
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(**inputs).logits, wanted[1])
    earlytom_compile.restore(model)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_images_and_observations_of_an_offloaded_model(inputs):
    with_image = video_inputs(tiny(), 12, images_per_row=(1,))
    wanted = oracle_tokens(tiny(), with_image)
    model = tiny()
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(new_tokens(compiled(model), with_image), wanted)
    (oracle,) = compressed_videos(tiny(), inputs, **OPTIONS)
    (observed,) = earlytom_compile.observe(model, inputs["pixel_values_videos"], **OPTIONS)
    width = observed.grid[1]
    assert [[frame, row * width + column] for frame, row, column in observed.kept] == oracle.kept.tolist()
    assert list(observed.frame_counts[1:]) == list(oracle.frames_after)


def test_embeddings_elsewhere():
    """As where the language model is on another device than the tower and the prompt."""

    class Elsewhere(nn.Module):
        def forward(self, ids):
            return torch.empty(*ids.shape, 48, device="meta")

    model = compiled(tiny())
    model.model.set_input_embeddings(Elsewhere())
    ids = torch.full((1, 3), model.config.video_token_id)
    rows = [(model.config.video_token_id, torch.rand(3, 48))]
    assert model.__dict__["_earlytom"].family.inputs(model, ids, rows)["inputs_embeds"].is_meta


def test_cuda_graphs_and_offloaded_weights_exclude_each_other(inputs):
    model = tiny()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(EarlyTomConfigError, match=r"weights of model\S* are offloaded, and CUDA graphs"):
        compiled(model, lowering="staged", mode="reduce-overhead")
    assert "_earlytom" not in model.__dict__


def test_hooks_of_accelerate_that_do_something_else_are_named(inputs):
    model = tiny()
    add_hook_to_module(mlp(model), SequentialHook(ModelHook()))
    with pytest.raises(EarlyTomConfigError, match=r"layers\.1\.mlp has a hook of accelerate .* \(ModelHook\)"):
        compiled(model)
    model = tiny()
    cpu_offload_with_hook(model, torch.device("cpu"))
    with pytest.raises(EarlyTomConfigError, match=r"the model has a hook of accelerate .* \(CpuOffload\)"):
        compiled(model)


def test_a_tower_on_several_devices_is_refused(inputs):
    model = tiny()
    mlp(model).to("meta")
    with pytest.raises(EarlyTomConfigError, match=r"one device \(model on cpu, .*layers\.1\.mlp\.fc1 on meta\)"):
        compiled(model)
    model = compiled(tiny())
    mlp(model).to("meta")
    with pytest.raises(EarlyTomConfigError, match="not on one device"):
        earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    with pytest.warns(EarlyTomFallbackWarning, match="not on one device"), pytest.raises(RuntimeError):
        new_tokens(model, inputs)  # nor can the model's own code


def test_a_model_without_weights_is_refused():
    with pytest.raises(EarlyTomConfigError, match=r"weights of model are not there \(device meta\)"):
        compiled(tiny().to("meta"))


def test_a_video_elsewhere_is_named(inputs):
    elsewhere = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].to("meta")}
    with pytest.raises(EarlyTomConfigError, match="videos are on meta and the vision tower on cpu"):
        new_tokens(compiled(tiny()), elsewhere)


@torch.no_grad()
def test_wrappers_are_told_from_models(inputs, wanted):
    for wrapper in (nn.DataParallel(tiny()), torch.compile(tiny())):
        with pytest.raises(EarlyTomConfigError, match=r"Give it the model inside \(\.(module|_orig_mod)\)"):
            compiled(wrapper)
    torch.testing.assert_close(nn.DataParallel(compiled(tiny()))(**inputs).logits, wanted[1])


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_sharded_weights(one_process, inputs, wanted):
    model = compiled(tiny())
    for layer in model.model.language_model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=one_process)
    assert torch.equal(new_tokens(model, inputs), wanted[0]), "of the language model alone"
    model = compiled(tiny())
    torch.distributed.fsdp.fully_shard(model, mesh=one_process)
    with pytest.warns(EarlyTomFallbackWarning, match="weights of the model are sharded"):
        model(**inputs)
    earlytom_compile.restore(model)
    with pytest.raises(EarlyTomConfigError, match="weights of the model are sharded"):
        compiled(model)


def test_models_inside_fsdp_are_refused(one_process):
    model = tiny()
    wrapper = torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(EarlyTomConfigError, match="got FullyShardedDataParallel"):
        compiled(wrapper)
    with pytest.raises(EarlyTomConfigError, match="weights of the model are sharded"):
        compiled(model)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight.tanh()


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after the first call"])
def test_parametrized_weights(when, inputs, wanted):
    model = tiny()
    if when != "before":
        new_tokens(compiled(model), inputs)
    weight_norm(mlp(model, 0).fc1)
    prune.l1_unstructured(mlp(model, 2).fc1, "weight", amount=0.5)  # by a hook
    parametrize.register_parametrization(mlp(model).fc1, "weight", Scaled())
    got = compiled(model)(**inputs).logits
    assert report(model).last_call == "compressed"
    torch.testing.assert_close(got, oracle_logits(model, inputs), **CLOSE)
    assert not torch.allclose(got, wanted[1], **CLOSE)


def doubling(module, args, output):
    return 2 * output + 1


@torch.no_grad()
def test_hooks_that_change_values_come_and_go(inputs, wanted):
    model = compiled(tiny())
    assert torch.equal(new_tokens(model, inputs), wanted[0])
    for _ in range(2):
        hook = mlp(model).register_forward_hook(doubling)
        hooked = new_tokens(model, inputs)
        hook.remove()
        assert torch.equal(new_tokens(model, inputs), wanted[0])
    assert report(model).to_dict()["graphs"] == 2, "with and without, and known when they come again"
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: None):
        assert torch.equal(new_tokens(model, inputs), wanted[0])
    assert report(model).to_dict()["graphs"] == 3
    mlp(model).register_forward_hook(doubling)
    assert torch.equal(hooked, oracle_tokens(model, inputs))
    assert not torch.equal(hooked, wanted[0])


@pytest.mark.long
@torch.no_grad()
def test_hooks_that_are_new_in_every_call_are_not_compiled_forever(inputs, wanted, monkeypatch):
    monkeypatch.setattr(video_encoder, "MOST_SETS_OF_HOOKS", 2)
    model = compiled(tiny())
    for _ in range(2):
        with mlp(model).register_forward_hook(lambda module, args, output: None):
            assert torch.equal(new_tokens(model, inputs), wanted[0])
    mlp(model).register_forward_hook(lambda module, args, output: None)
    with pytest.warns(EarlyTomFallbackWarning, match="have changed 2 times"):
        new_tokens(model, inputs)
    assert report(model).to_dict()["graphs"] == 2


@pytest.mark.long
@torch.no_grad()
def test_a_hook_that_breaks_the_graph_is_named(inputs):
    model = tiny()
    mlp(model).register_forward_hook(lambda module, args, output: output * (2 + 0 * output.sum().item()))
    with pytest.warns(EarlyTomFallbackWarning) as warned:
        got = new_tokens(compiled(model), inputs)
    assert "hooks in the video path (on model.vision_tower.encoder.layers.1.mlp) break" in str(warned[-1].message)
    assert report(model).last_call == "uncompressed"
    earlytom_compile.restore(model)
    assert torch.equal(got, new_tokens(model, inputs))


def test_language_models_that_are_not_compiled_are_told():
    model = tiny()
    with model.model.language_model.layers[0].mlp.register_forward_hook(doubling):
        compiled(model, lowering="staged")
        assert report(model).to_dict()["reasons"][-1].endswith("not compiled: it has hooks")
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert report(model).to_dict()["reasons"][-1].endswith("not compiled: it is placed by accelerate or FSDP")


@pytest.mark.long
@torch.no_grad()
def test_prompts_of_a_language_model_with_hooks(inputs, wanted, monkeypatch):
    leave_pieces_as_they_are(monkeypatch)
    model = compiled(tiny(), lowering="staged")
    layer = model.model.language_model.layers[0].mlp
    assert torch.equal(new_tokens(model, inputs), wanted[0])
    with layer.register_forward_hook(doubling):
        hooked = new_tokens(model, inputs)
        assert torch.equal(hooked, oracle_tokens(model, inputs))
        assert not torch.equal(hooked, wanted[0])
        compiled(model, lowering="staged")
        assert report(model).to_dict()["reasons"][-1].endswith("not compiled: it has hooks")
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(new_tokens(model, inputs), wanted[0])
    assert report(model).to_dict()["reasons"][-1].endswith("not compiled: it is placed by accelerate or FSDP")


def replaced(model):
    model.model.vision_tower.encoder.layers[0].mlp = copy.deepcopy(mlp(model, 2))


def replaced_by_another_kind(model):
    old = mlp(model, 0)
    model.model.vision_tower.encoder.layers[0].mlp = nn.Sequential(old.fc1, nn.ReLU(), old.fc2)


CHANGES = {
    "in place": lambda model: mlp(model).fc1.weight.mul_(-2),
    "a new parameter": lambda model: setattr(mlp(model).fc1, "weight", nn.Parameter(mlp(model).fc1.weight * -2)),
    "another module": replaced,
    "load_state_dict": lambda model: model.load_state_dict(tiny(seed=3).state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(tiny(seed=4).state_dict(), assign=True),
    "float64": lambda model: model.to(torch.float64),
    "device": lambda model: model.to("cpu"),
    "another kind of module": replaced_by_another_kind,
}


FEW_CHANGES = ("in place", "another module", "float64")


@torch.no_grad()
@pytest.mark.parametrize("names", [FEW_CHANGES, pytest.param(CHANGES, marks=pytest.mark.long)], ids=["few", "all"])
def test_weights_that_change_after_compiling(inputs, names):
    model = compiled(tiny())
    for name in names:
        before = model(**inputs).logits
        CHANGES[name](model)
        got = model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"].to(model.dtype)}).logits
        assert (report(model).last_call, got.dtype) == ("compressed", model.dtype), name
        model.float()
        if name not in ("float64", "device"):
            assert not torch.allclose(got.float(), before, **CLOSE), name
        torch.testing.assert_close(got.float(), oracle_logits(copy.deepcopy(model), inputs), **CLOSE)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_after_compiling(dtype, inputs):
    """Compared with a model compiled in it: rounding decides which frames merge."""
    these = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].to(dtype)}
    model = compiled(tiny())
    model(**inputs)
    got = model.to(dtype)(**these).logits
    assert (report(model).last_call, got.dtype) == ("compressed", dtype)
    torch.testing.assert_close(got, compiled(tiny().to(dtype))(**these).logits)
