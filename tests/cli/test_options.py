"""Flags and EarlyTomConfig are the same thing, and asking for help costs nothing."""

import dataclasses
import subprocess
import sys

import pytest

from earlytom_compile import EarlyTomConfig, EarlyTomConfigError
from earlytom_compile.cli.main import build_parser, main
from earlytom_compile.cli.options import COMMON, given_options, require_effect

FIELDS = [field.name for field in dataclasses.fields(EarlyTomConfig)]


def options_of(*flags):
    return given_options(build_parser().parse_args(["explain", *flags]))


def test_nothing_given_is_nothing_passed_on():
    assert options_of() == {}


@pytest.mark.parametrize("command", ["demo", "run", "explain"])
def test_every_field_is_a_flag_with_its_meaning(command, capsys):
    for flag, names in (("--help", COMMON), ("--help-all", FIELDS)):
        with pytest.raises(SystemExit, match="0"):
            main([command, flag])
        text = capsys.readouterr().out
        shown = [name for name in FIELDS if f"--{name.replace('_', '-')} " in text]
        assert shown == list(names)
        assert "share of the video tokens" in " ".join(text.split())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mode", "max-autotune", "--lowering", "eager"], "nothing is compiled"),
        (["--lowering", "eager", "--compile-llm"], "nothing is compiled"),
    ],
)
def test_options_that_would_do_nothing_beside_others_are_refused(flags, message, capsys):
    assert main(["explain", *flags]) == 2
    assert message in capsys.readouterr().err
    assert options_of(*flags[:2]) and options_of(*flags[2:])  # each alone has its use


@pytest.mark.parametrize("variant", [[], ["--variant", "plus"]])
def test_where_static_frames_are_selected_is_nothing_to_plus(variant, capsys):
    assert main(["explain", "--static-selection", "host", *variant]) == 2
    assert "selects on the device" in capsys.readouterr().err
    assert options_of("--static-selection", "host", "--variant", "paper") and options_of(*variant) is not None


@pytest.mark.parametrize("command", ["demo", "run", "explain", "bench", "export"])
def test_plus_is_the_default_of_every_command(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    _, _, said = text.rpartition("--variant {paper,released,plus}")  # behind the usage
    assert "(default: plus)" in said.partition(" --")[0]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--retain-ratio", "0.1"], {"retain_ratio": 0.1}),
        (["--variant", "released"], {"variant": "released"}),
        (["--variant", "plus"], {"variant": "plus"}),
        (["--variant", "paper", "--merge-layers", "6,21,23"], {"variant": "paper", "merge_layers": (6, 21, 23)}),
        (["--merge-layers", "none"], {"merge_layers": None}),
        (["--no-reuse", "--max-window", "8", "--alpha", "1"], {"reuse": False, "max_window": 8, "alpha": 1.0}),
        (["--tau-merge", "segment"], {"tau_merge": "segment"}),
        (
            ["--variant", "paper", "--tau-merge", "0.8", "--tau-seg", "-0.5"],
            {"variant": "paper", "tau_merge": 0.8, "tau_seg": -0.5},
        ),
        (["--encode-ratio", "0.35"], {"encode_ratio": 0.35}),
        (["--variant", "plus", "--full-layers", ""], {"variant": "plus", "full_layers": ()}),
        (["--reuse", "--full-layers", "5,7"], {"reuse": True, "full_layers": (5, 7)}),
        (["--reuse", "--full-layers", "none"], {"reuse": True, "full_layers": None}),
        (
            ["--no-reuse", "--variant", "plus", "--merge-layers", "3"],
            {"reuse": False, "variant": "plus", "merge_layers": (3,)},
        ),
        (["--reuse", "--tau-reuse", "0"], {"reuse": True, "tau_reuse": 0.0}),
        (["--reuse", "--encode-ratio", "0.35"], {"reuse": True, "encode_ratio": 0.35}),
        (["--reuse", "--encode-ratio", "none"], {"reuse": True, "encode_ratio": None}),
        (["--lowering", "eager", "--strict"], {"lowering": "eager", "strict": True}),
        (["--no-strict"], {"strict": False}),
        (["--preset", "videomme", "--retain-ratio", "0.1"], {"preset": "videomme", "retain_ratio": 0.1}),
    ],
)
def test_values_arrive_as_the_config_wants_them(flags, expected):
    assert options_of(*flags) == expected


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"variant": "paper", "static_selection": "host"}])
def test_options_that_a_device_has_no_use_for_are_refused_there(options):
    require_effect(options, "cuda")
    with pytest.raises(EarlyTomConfigError, match="on cpu: .*leave it out"):
        require_effect(options, "cpu")
    require_effect({"mode": "max-autotune", "static_selection": "auto"}, "cpu")


def test_an_explicit_flag_wins_over_the_preset():
    options = options_of("--preset", "videomme", "--tau-seg", "0.9")
    assert EarlyTomConfig.from_options(options).tau_seg == 0.9


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--retain-ratio", "2"], "retain_ratio=2.0"),
        (["--retain-ratio", "much"], "retain_ratio='much'"),
        (["--variant", "papr"], "'paper', 'released', 'plus'"),
        (["--merge-layers", "six"], "merge_layers='six'"),
        (["--max-window", "1.5"], "max_window='1.5'"),
        (["--preset", "nothing"], "preset='nothing'"),
        (["--reuse", "--tau-reuse", "low"], "tau_reuse='low'"),
        (["--reuse", "--full-layers", "last"], "full_layers='last'"),
        (["--reuse", "--encode-ratio", "0"], "encode_ratio=0.0"),
        (["--variant", "paper", "--encode-ratio", "0.5"], "encode_ratio=0.5 without reuse"),
        (["--tau-seg", "0.4"], 'tau_seg=0.4 with variant="plus", the default, which reuses patches'),
        (["--no-reuse", "--variant", "plus", "--tau-reuse", "0.1"], "tau_reuse=0.1 without reuse"),
        (["--variant", "plus", "--tau-merge", "0.8"], 'tau_merge=0.8 with variant="plus"'),
        (["--reuse", "--encode-ratio", "0.5", "--tau-reuse", "0.1"], "tau_reuse=0.1 with encode_ratio=0.5"),
    ],
)
def test_bad_values_get_the_configs_own_error(flags, message, capsys):
    with pytest.raises(EarlyTomConfigError, match=message):
        options_of(*flags)
    assert main(["explain", *flags]) == 2
    assert message.replace("\\", "") in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from earlytom_compile.cli.main import main\n"
        "try:\n    main(['demo', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, stdout=subprocess.DEVNULL)
