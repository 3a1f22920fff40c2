"""What people expect of a command line before it does anything: help, versions, and mistakes by name."""

import errno
import os
import re
import runpy
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from effort import diagonal, examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.cli.main import build_parser, main

COMMANDS = {
    "demo": [],
    "run": ["--model", "m", "--video", "v", "--prompt", "p"],
    "explain": [],
    "compare": ["--model", "m", "--videos", "v", "--questions", "q"],
    "bench": [],
    "flops": [],
    "export": ["--model", "m", "-o", "v.pt2"],
    "eval": ["--toy"],
}
EXAMPLES = Path(__file__).parents[2] / "examples"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 0
    return capsys.readouterr().out


@cache
def parser_of(command):
    (commands,) = (action for action in build_parser()._actions if action.choices and command in action.choices)
    return commands.choices[command]


def flags_of(command):
    return sorted(flag for flag in parser_of(command)._option_string_actions if flag.startswith("--"))


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["run", "--ratio", "0.1"], "--retain-ratio"),
        (["bench", "--ratio", "0.1"], "--retain-ratio"),
        (["run", "--retain", "0.1"], "--retain-ratio"),
        (["run", "--modl", "m"], "--model"),
        (["run", "--vidoe", "v.mp4"], "--video"),
        (["run", "--max_new_tokens=3"], "--max-new-tokens"),
        (["run", "--retain_ratio", "0.1"], "--retain-ratio"),
        (["explain", "--merge-layer", "6"], "--merge-layers"),
        (["eval", "--methodes", "plus"], "--methods"),
        (["--verson"], "--version"),
    ],
)
def test_an_unknown_option_names_the_nearest_and_its_command(words, nearest, capsys):
    said = refused(capsys, *words)
    wrong = next(word for word in words if word.startswith("--")).partition("=")[0]
    assert re.search(rf"unknown option {wrong}; did you mean {nearest}s?\?", " ".join(said.split()))
    command = words[0] if not words[0].startswith("-") else ""
    assert said.startswith(f"usage: earlytom {command}".strip())


def test_what_is_like_nothing_names_the_help(capsys):
    assert "unknown option --xyzzy: earlytom run --help lists what there is" in refused(capsys, "run", "--xyzzy")


@examples(60)
@given(st.data())
def test_a_slip_of_the_finger_is_put_right(data):
    """One letter of a long enough option left out, doubled or swapped with the next."""
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    flag = data.draw(st.sampled_from([flag for flag in flags_of(command) if len(flag) > 8]))
    place = data.draw(st.integers(3, len(flag) - 2))
    slips = (flag[:place] + flag[place + 1 :], flag[:place] + flag[place] + flag[place:])
    wrong = data.draw(st.sampled_from(slips))
    if wrong in flags_of(command):
        return
    hint = parser_of(command)._hint(wrong)
    # --retain-ratio and --retain-ratios are one option.
    assert hint.removeprefix("; did you mean ").rstrip("?").rstrip("s") == flag.rstrip("s")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_not_abbreviated(command, capsys):
    for flag in flags_of(command):
        if flag[:-1] not in flags_of(command):
            assert f"unknown option {flag[:-1]}" in refused(capsys, command, *COMMANDS[command], flag[:-1], "3")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_help_all_has_everything(command, capsys):
    few, every = help_of(capsys, command, "--help"), help_of(capsys, command, "--help-all")
    assert len(few.splitlines()) <= 60 < 45 + len(every.splitlines())
    shown = set(re.findall(r"--[a-z][a-z-]*", every))
    assert set(flags_of(command)) <= shown
    assert set(re.findall(r"--[a-z][a-z-]*", few)) < shown
    assert "--help-all shows" in few and "--help-all shows" not in every


def test_help_says_that_families_of_other_packages_count(capsys):
    assert "of a family that an installed package registers" in " ".join(help_of(capsys, "run", "--help").split())


@pytest.mark.parametrize("command", ["run", "bench", "flops"])
def test_one_value_given_twice_is_not_the_last_one_in_silence(command, capsys):
    said = refused(capsys, command, *COMMANDS[command], "--frames", "8", "--frames", "16")
    assert "--frames is given twice" in said


def test_several_videos_and_questions_are_all_kept():
    words = ["run", "--model", "m", "--video", "a", "--video", "b", "--prompt", "p", "--prompt=q"]
    arguments = build_parser().parse_args(words)
    assert (arguments.video, arguments.prompt) == (["a", "b"], ["p", "q"])
    assert arguments.given == {"model", "video", "prompt"}


def test_values_that_look_like_options_are_values():
    words = ["run", "--model", "m", "--video", "v", "--prompt", "--what is it?", "--tau-seg", "-0.5"]
    arguments = build_parser().parse_args(words)
    assert arguments.prompt == ["--what is it?"] and arguments.tau_seg == -0.5


@pytest.mark.parametrize("flag, value", [("--video", "-x.mp4"), ("--json", "-x.json"), ("--video", "-help.mp4")])
def test_a_value_that_argparse_takes_for_an_option_is_told_how_to_be_one(flag, value, capsys):
    said = " ".join(refused(capsys, "run", "--model", "m", "--prompt", "p", flag, value).split())
    assert f"argument {flag}: {value!r} looks like an option: write {flag}={value} to mean the value." in said


@pytest.mark.parametrize("after", [[], ["--prompt", "p"]])
def test_a_value_that_is_missing_is_no_value_that_looks_like_an_option(after, capsys):
    assert "argument --video: expected one argument" in refused(capsys, "run", "--video", *after)


@pytest.mark.parametrize("command", COMMANDS)
def test_words_without_an_option_are_refused(command, capsys):
    assert "'clip.mp4'" in refused(capsys, command, *COMMANDS[command], "clip.mp4")


def test_an_unknown_command_lists_those_there_are(capsys):
    said = refused(capsys, "rum")
    assert all(command in said for command in COMMANDS)


def test_versions(capsys):
    said = help_of(capsys, "--version")
    assert said.startswith("earlytom-compile ")
    for version in (f"torch {torch.__version__.partition('+')[0]}", f"transformers {transformers.__version__}"):
        assert version in said


def test_the_package_is_a_program():
    run = subprocess.run([sys.executable, "-P", "-m", "earlytom_compile", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("earlytom-compile ")


@pytest.mark.parametrize("name", ["generate.py", "forward.py", "follow_up.py"])
def test_examples_without_arguments_print_their_usage(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().err.startswith(f"usage: {name} [-h] checkpoint video ")


def test_an_interruption_says_so_and_is_130(monkeypatch, capsys):
    from earlytom_compile.cli import flops

    def stop(arguments, options):
        raise KeyboardInterrupt("1 row is in x.json")

    monkeypatch.setattr(flops, "execute", stop)
    assert main(["flops"]) == 130
    assert "earlytom flops: stopped: 1 row is in x.json" in capsys.readouterr().err


def test_our_warnings_are_lines_for_people(monkeypatch, capsys):
    from earlytom_compile import EarlyTomFallbackWarning
    from earlytom_compile.cli import flops

    def warn(arguments, options):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *told: print(warnings.formatwarning(*told[:4]), end="", file=sys.stderr)
            warnings.warn("runs uncompressed.", EarlyTomFallbackWarning, stacklevel=2)
            warnings.warn("of somebody else", UserWarning, stacklevel=2)

    monkeypatch.setattr(flops, "execute", warn)
    usual = warnings.formatwarning
    assert main(["flops"]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "earlytom flops: warning: runs uncompressed."
    assert second.endswith("UserWarning: of somebody else") and warnings.formatwarning is usual


def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{sys.executable} -P -m earlytom_compile flops --protocol exact | head -1"
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert run.stdout.startswith("Prefill of") and run.stderr == ""


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("words", "buffered"),
    diagonal([["flops"], ["flops", "--json", "-"], ["--help"], ["flops", "--help"], ["--version"]], [True, False]),
)
def test_output_that_cannot_be_written_is_said_and_is_2(words, buffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with FULL.open("w") as full:
        command = [sys.executable, "-P", "-m", "earlytom_compile", *words]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    *tables, said = run.stderr.splitlines()
    assert said == "earlytom: the standard output cannot be written (No space left on device)."
    assert not tables or "--json" in words


def test_other_errors_of_the_system_are_not_taken_for_output_that_is_lost(monkeypatch):
    from earlytom_compile.cli import flops

    def fail(arguments, options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flops, "execute", fail)
    with pytest.raises(OSError, match="No space left"):
        main(["flops"])


def test_a_closed_standard_output_is_found_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr("importlib.import_module", lambda *args: pytest.fail("imported"))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["flops"]) == 2
    assert "earlytom flops: the standard output is closed" in capsys.readouterr().err
