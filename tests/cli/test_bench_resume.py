"""Ctrl-C in ``earlytom bench``: what was measured is in the file, and ``--resume`` measures the rest, whatever it is.

Arms are counters here: which of them are called when is what these tests are about.
"""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.benchmarks.arms import Arm
from earlytom_compile.benchmarks.forecast import Piece
from earlytom_compile.benchmarks.load import LoadResult, Server
from earlytom_compile.benchmarks.load_results import Load, load_to_dict
from earlytom_compile.benchmarks.measure import Result
from earlytom_compile.cli import bench, bench_load
from earlytom_compile.cli.main import main

ARMS = ("transformers", "inductor")
CALLS_BEFORE = 2  # of an arm, before it is timed
LAYERS = SimpleNamespace(num_hidden_layers=2)
PART = torch.nn.Identity()
MODEL = SimpleNamespace(
    model=SimpleNamespace(vision_tower=PART, multi_modal_projector=PART, language_model=SimpleNamespace(layers=[PART])),
    device=torch.device("cpu"),
    dtype=torch.float32,
    config=SimpleNamespace(vision_config=LAYERS, text_config=LAYERS),
)


@contextmanager
def counted(stop_at=None):
    """Calls by (frames, arm), in their order; the ``stop_at``-th is Ctrl-C."""
    calls = []

    def arms(model, inputs, ratios, options, methods):
        for name in ARMS:

            def first_token(name=name):
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                calls.append((inputs["frames"], name))
                return torch.tensor([[1]]), SimpleNamespace(get_seq_length=lambda: 100)

            yield Arm(name, first_token, frames=inputs["frames"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_model", lambda arguments: MODEL)
        patch.setattr(bench, "_ceilings", lambda session: {})
        patch.setattr(bench, "make_inputs", lambda model, **sizes: sizes)
        patch.setattr(bench, "make_arms", arms)
        patch.setattr(bench, "measured_piece", lambda model, inputs: Piece(0.5, 0.01))
        patch.setattr(bench, "profile_arms", lambda model, arms, progress: ({}, {"traceEvents": []}))
        patch.setattr(bench, "_require_compiler", lambda *given: None)
        patch.setattr(bench, "environment", lambda device: {"machine": "a fast one", "command": "earlytom bench"})
        yield calls


def command(file, frames="2,4", repeats=3, *more):
    return ["bench", "--frames", frames, "--repeats", str(repeats), "--decode-tokens", "0", "--json", str(file), *more]


def content_of(file):
    return {workload["frames"]: workload for workload in json.loads(Path(file).read_text())["workloads"]}


@examples(15)
@given(repeats=st.integers(1, 3), data=st.data())
def test_wherever_it_is_stopped_the_rest_is_measured_and_nothing_twice(repeats, data):
    one = len(ARMS) * (CALLS_BEFORE + repeats)  # table
    stop_at = data.draw(st.integers(0, 2 * one - 1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        with counted(stop_at) as calls:
            assert main(command(file, repeats=repeats)) == 130
        assert len(calls) == stop_at
        timed = (
            [len(result["ttft"]) for workload in content_of(file).values() for result in workload["results"]]
            if file.exists()
            else []
        )
        with counted() as calls:
            assert main(command(file, "2,4", repeats, "--resume")) == 0
        content = content_of(file)
        assert list(content) == [2, 4] and all(workload["complete"] for workload in content.values())
        for workload in content.values():
            assert [len(result["ttft"]) for result in workload["results"]] == [repeats] * len(ARMS)
            assert [result["name"] for result in workload["results"]] == list(ARMS)
        # First calls are made again in a table that was not finished; rounds never are.
        open_tables = 2 - stop_at // one
        assert len(calls) == open_tables * len(ARMS) * CALLS_BEFORE + 2 * len(ARMS) * repeats - sum(timed)


def test_ctrl_c_says_what_is_saved_and_where(tmp_path, capsys):
    file = tmp_path / "bench.json"
    with counted(stop_at=len(ARMS) * (CALLS_BEFORE + 3) + len(ARMS) * (CALLS_BEFORE + 1) + 1):
        assert main(command(file)) == 130
    said = capsys.readouterr()
    assert f"stopped: {file} has 1 finished table and 1 of 3 rounds at 4 frames;" in " ".join(said.err.split())
    assert "the same command with --resume goes on from there" in said.err
    assert "2 frames, batch 1" in said.out and "4 frames, batch 1" not in said.out


def test_before_anything_is_finished_ctrl_c_says_that(tmp_path, capsys):
    file = tmp_path / "bench.json"
    for stop_at in (0, 3):  # before the first call, among the first calls
        with counted(stop_at):
            assert main(command(file)) == 130
        assert f"nothing was finished yet that {file} could have" in " ".join(capsys.readouterr().err.split())
        assert not file.exists()


def test_without_a_file_ctrl_c_says_that_nothing_was_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (command("-"), command("x")[:-2]):
        with counted(stop_at=3):
            assert main(words) == 130
        assert "nothing was saved. With --json FILE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_json_on_the_standard_output_is_alone_there(capsys):
    with counted():
        assert main(command("-")) == 0
    out, err = capsys.readouterr()
    assert [workload["frames"] for workload in json.loads(out)["workloads"]] == [2, 4]
    assert "4 frames, batch 1" in err


def test_more_rounds_or_lengths_can_be_added_later(tmp_path, capsys):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file, "4", 1))
    with counted() as calls:
        main(command(file, "2,4", 2, "--resume"))
    assert calls.count((4, "inductor")) == CALLS_BEFORE + 1 and calls.count((2, "inductor")) == CALLS_BEFORE + 2
    with counted() as calls:
        main(command(file, "2,4", 2, "--resume"))
    assert calls == []


@pytest.mark.parametrize("frames, stop_at", [("2", None), ("8,2,4", 0), ("8,2,4", len(ARMS) * CALLS_BEFORE + 1)])
def test_what_the_file_has_stays_in_it(tmp_path, frames, stop_at, capsys):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file))
    before = content_of(file)
    with counted(stop_at):
        main(command(file, frames, 3, "--resume"))
    after = content_of(file)
    assert all(after[length] == before[length] for length in (2, 4))


def test_a_length_given_twice_is_one_table(capsys):
    with counted() as calls:
        assert main(command("-", "4,4", 1)) == 0
    assert len(json.loads(capsys.readouterr().out)["workloads"]) == 1 and len(calls) == len(ARMS) * (CALLS_BEFORE + 1)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--batch", "2"], "was made with batch=1, and this would be batch=2"),
        (["--shape", "cpu-medium"], "was made with shape='cpu-small', and this would be shape='cpu-medium'"),
        (["--variant", "plus"], "variant=None, and this would be variant='plus'"),
    ],
)
def test_rows_of_another_measurement_are_refused(tmp_path, more, says, capsys):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file))
    before = file.read_text()
    with counted() as calls:
        assert main(command(file, "2,4", 3, "--resume", *more)) == 2
    assert says in capsys.readouterr().err and calls == [] and file.read_text() == before


def test_an_option_of_none_is_one_that_is_not_given(tmp_path):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file, "2", 1))
        assert main(command(file, "2", 1, "--resume", "--mode", "none")) == 0


def test_rows_of_another_machine_are_refused(tmp_path, capsys):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file))
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": "an abacus"}))
    assert main(command(file, "2,4", 3, "--resume")) == 2
    assert "machine='an abacus'" in capsys.readouterr().err


def test_single_calls_and_load_are_two_files(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    with counted():
        main(command(file))
        assert main([*command(file), "--resume", "--concurrency", "2"]) == 2
        assert "was made with max_batch=None, and this would be max_batch=8" in capsys.readouterr().err
        content = json.loads(file.read_text())
        content["asked"] |= {"max_batch": 8, "repeats": 3}
        file.write_text(json.dumps(content))
        assert main([*command(file), "--resume"]) == 2
        assert "was made with max_batch=8, and this would be max_batch=None" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_file_of_bench_is_refused(tmp_path, text, capsys):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with counted() as calls:
        assert main(command(file, "2,4", 3, "--resume")) == 2
    assert "--resume" in capsys.readouterr().err and calls == [] and file.read_text() == text


def test_a_file_that_is_not_there_yet_is_begun(tmp_path, capsys):
    with counted() as calls:
        assert main(command(tmp_path / "new.json", "2", 1, "--resume")) == 0
    assert "is not there yet" in capsys.readouterr().err and len(calls) == len(ARMS) * (CALLS_BEFORE + 1)


def test_a_result_comes_back_as_it_was():
    result = Result("inductor", 1.0, 4.0, 2.5, [0.5], [0.1], 1, 100, 3 << 30, 1, [[32, 24]], [6])
    assert Result.from_dict({**vars(result), "video_tokens": 67, "speed": {}}) == result


def test_load_goes_on_with_the_next_number_of_clients(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(servers, prompts, **sizes):
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(len(prompts))
        return [LoadResult("transformers", 1.0, len(prompts), [4.0], [1.0], [2.0], [1])]

    monkeypatch.setattr(bench_load, "measure_load", measure)
    monkeypatch.setattr(bench_load, "make_servers", lambda *given: [Server("transformers", print)])
    monkeypatch.setattr(bench_load, "make_prompts", lambda model, clients, **look: [{}] * clients)
    monkeypatch.setattr(bench_load, "measured_piece", lambda model, inputs: Piece(0.5, 0.01))
    file, stop_at = tmp_path / "load.json", 2
    words = [*command(file, "2", 1), "--concurrency", "1,2,3"]
    with counted():
        assert main(words) == 130
        assert f"{file} has 2 finished tables;" in " ".join(capsys.readouterr().err.split())
        stop_at = None
        assert main([*words, "--resume"]) == 0
        loads = json.loads(file.read_text())["loads"]
        printed = capsys.readouterr().out
        words[words.index("1,2,3")] = "4,1"
        assert main([*words, "--resume"]) == 0 and measured == [1, 2, 3, 4]
    kept = json.loads(file.read_text())["loads"]
    assert sorted(load["concurrency"] for load in kept) == [1, 2, 3, 4]
    assert [load["concurrency"] for load in loads] == [1, 2, 3]
    again = [Load.from_dict(load) for load in loads]
    assert load_to_dict(again, {})["loads"] == loads
    assert printed.count("clients, batches of") == 2
