"""``--model_args``: every option by its name, as text or as lmms-eval reads it, and mistakes by theirs."""

import dataclasses

import pytest

from earlytom_compile import EarlyTomConfig, EarlyTomConfigError
from earlytom_compile.integrations.lmms_eval.arguments import read_arguments, read_options

VALUES = {
    "retain_ratio": ("0.15", 0.15),
    "variant": ("plus", "plus"),
    "reuse": (True, True),
    "tau_reuse": ("0.1", 0.1),
    "full_layers": ("[3,7]", (3, 7)),
    "encode_ratio": ("0.4", 0.4),
    "merge_layers": ("[6,21,23]", (6, 21, 23)),
    "tau_seg": ("0.5", 0.5),
    "alpha": ("0.8", 0.8),
    "max_window": ("8", 8),
    "tau_merge": ("0.7", 0.7),
    "lowering": ("whole", "whole"),
    "mode": ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"),
    "compile_llm": (False, False),
    "static_selection": ("auto", "auto"),
    "method": ("earlytom", "earlytom"),
    "inner_layer": ("18", 18),
    "inner_drop_ratio": ("0.4", 0.4),
    "strict": (False, False),
    "preset": ("videomme", "videomme"),
}
"""Option -> what lmms-eval hands over, or a text, and what it means."""
BESIDE = {
    **{name: {"reuse": True} for name in ("tau_reuse", "full_layers", "encode_ratio")},
    **{name: {"variant": "paper"} for name in ("merge_layers", "tau_seg", "alpha", "max_window", "tau_merge")},
    "inner_drop_ratio": {"inner_layer": 18},
}
"""Option -> those without which it would have no effect."""


def test_all_options_of_the_compiler_are_known():
    assert set(VALUES) == {field.name for field in dataclasses.fields(EarlyTomConfig)}


@pytest.mark.parametrize("name", VALUES)
def test_each_option_reaches_the_compiler_as_it_is_meant(name):
    text, meant = VALUES[name]
    read = read_arguments({"pretrained": "x", **BESIDE.get(name, {}), name: text})
    options = {"retain_ratio": read.retain_ratio, **read.options}
    assert options[name] == meant and type(options[name]) is type(meant)
    assert getattr(EarlyTomConfig.from_options(options), name) == meant


def test_defaults_are_those_of_the_project_but_for_strict():
    read = read_arguments({"pretrained": "x"})
    assert (read.retain_ratio, read.options) == (EarlyTomConfig.retain_ratio, {"strict": True})
    assert EarlyTomConfig.from_options(read.options).variant == "plus"
    assert (
        EarlyTomConfig.from_options(read_arguments({"pretrained": "x", "preset": "videomme"}).options).variant
        == "paper"
    )
    assert (read.device, read.dtype, read.max_frames, read.batch_size) == ("auto", "auto", None, 1)


@pytest.mark.parametrize("full", ["full", "Full", "FULL", None])
def test_the_full_model_by_the_same_command(full):
    given = {"pretrained": "x", "preset": "videomme", "variant": "plus"}
    assert read_arguments({**given, "retain_ratio": 0.25}).retain_ratio == 0.25
    assert read_arguments({**given, "retain_ratio": full}).retain_ratio is None
    with pytest.raises(EarlyTomConfigError, match="variant='plu'"):
        read_arguments({**given, "variant": "plu", "retain_ratio": full})


@pytest.mark.parametrize("spelled", ["6,21,23", "'6,21,23'", '"6,21,23"', "[6, 21, 23]", "(6,21,23)", (6, 21, 23)])
def test_layers_may_be_written_as_a_shell_leaves_them(spelled):
    assert read_options({"variant": "paper", "merge_layers": spelled})[1]["merge_layers"] == (6, 21, 23)
    assert read_options({"variant": "paper", "merge_layers": 6})[1]["merge_layers"] == (6,)
    assert read_options({"variant": "plus", "full_layers": spelled})[1]["full_layers"] == (6, 21, 23)
    assert read_options({"variant": "plus", "full_layers": 6})[1]["full_layers"] == (6,)


@pytest.mark.parametrize("spelled", ["", "[]", "()", ()])
def test_no_layer_at_all_may_be_said(spelled):
    assert read_options({"variant": "plus", "full_layers": spelled})[1]["full_layers"] == ()


@pytest.mark.parametrize("given, meant", [("4", 4), (4, 4), ("1", 1)])
def test_numbers_that_come_as_text(given, meant):
    read = read_arguments({"pretrained": "x", "batch_size": given, "max_frames_num": given})
    assert (read.batch_size, read.max_frames) == (meant, meant)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"retain_ration": 0.1}, r"unknown option 'retain_ration'; did you mean 'retain_ratio'.* pretrained, device"),
        ({"conv_template": "qwen_1_5"}, "unknown option 'conv_template'"),
        ({"inner_layer": 0}, "inner_layer=0: must be None or a 0-based layer of at least 1"),
        ({"retain_ratio": 1.5}, r"retain_ratio=1.5: must be in \(0, 1\], or full for the model as it is"),
        ({"retain_ratio": "all"}, "retain_ratio='all': .* or full"),
        ({"preset": "videomme", "retain_ratio": 0.3}, "Table 8 has rows for 0.25, 0.2, 0.15, 0.1"),
        ({"lowering": "eager", "mode": "default"}, "nothing is compiled; leave one out"),
        ({"merge_layers": 3}, r"merge_layers=\(3,\) with .*the default, .*variant=.paper"),
        ({"variant": "paper", "encode_ratio": 0.5}, r"encode_ratio=0.5 without reuse, .*reuse=True"),
        ({"variant": "plus", "merge_layers": 3}, r"merge_layers=\(3,\) with variant=.plus.*reuse=False"),
        ({"reuse": "yes"}, "reuse='yes': must be True, False or None"),
        ({"dtype": "int8"}, "dtype='int8': must be one of 'auto', 'float32'"),
        ({"dtype": "float16", "torch_dtype": "float16"}, "left out beside dtype"),
        ({"batch_size": "auto"}, "batch_size='auto': must be a whole number, at least 1"),
        ({"max_frames_num": 0}, "max_frames_num=0: must be a whole number, at least 1"),
        ({"pretrained": ""}, "pretrained='': must be a checkpoint folder or Hub id"),
    ],
)
def test_mistakes_are_named(given, says):
    with pytest.raises(EarlyTomConfigError, match=says):
        read_arguments({"pretrained": "x", **given})


def test_a_kind_of_checkpoint_may_have_arguments_of_its_own():
    read = read_arguments({"pretrained": "x", "conv_template": "qwen_2"}, own=("conv_template",))
    assert read.own == {"conv_template": "qwen_2"} and "conv_template" not in read.options
