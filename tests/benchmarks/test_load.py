"""Every request is answered once, in its turn, and with the answer it would have got alone; times are what they say."""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import TinySize, write_checkpoint
from tiny_models import tiny_llava_onevision
from without_inductor import leave_graphs_as_they_are

import earlytom_compile
from earlytom_compile.benchmarks import load as serving
from earlytom_compile.benchmarks.load import (
    LoadResult,
    Server,
    closed_loop,
    left_padded,
    make_prompts,
    make_servers,
    measure_load,
)
from earlytom_compile.benchmarks.load_results import Load, load_table, load_to_dict, load_to_markdown, write_load_plots
from earlytom_compile.cli.main import main

EAGER = {"variant": "paper", "lowering": "eager", "merge_layers": (0, 1), "tau_seg": 0.3}


class FakeServer:
    """Answers call after call in known times: (seconds to the first token, seconds from there to the last)."""

    def __init__(self, seconds, fails_at=None):
        self.seconds = itertools.cycle(seconds)
        self.fails_at = fails_at
        self.now = 100.0
        self.calls = []  # (start, first token, end, requests)

    def __call__(self, batch):
        if len(self.calls) == self.fails_at:
            raise ValueError("the model broke")
        start, (first, rest) = self.now, next(self.seconds)
        self.now += first + rest
        self.calls.append((start, start + first, self.now, list(batch)))
        return start + first, [[request.client, request.number] for request in batch]

    def loop(self, **sizes):
        return closed_loop(self, clock=lambda: self.now, **sizes)


# Whole numbers, so that sums of times are exact.
SERVICE = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5)
SIZES = st.fixed_dictionaries(
    {"clients": st.integers(1, 12), "each": st.integers(1, 4), "max_batch": st.integers(1, 9)}
)


@given(SERVICE, SIZES)
def test_every_request_is_answered_once_and_with_its_own_answer(seconds, sizes):
    answered = FakeServer(seconds).loop(**sizes)
    every = list(itertools.product(range(sizes["clients"]), range(sizes["each"])))
    assert sorted((a.request.client, a.request.number) for a in answered) == every
    assert all(a.answer == [a.request.client, a.request.number] for a in answered)


@given(SERVICE, SIZES)
def test_who_waits_longest_is_next_and_nobody_waits_while_a_place_is_free(seconds, sizes):
    server = FakeServer(seconds)
    answered = server.loop(**sizes)
    arrivals = [a.request.arrived for a in answered]
    assert arrivals == sorted(arrivals)
    gone = set()
    for start, _, _, batch in server.calls:
        waiting = {a.request for a in answered if a.request.arrived <= start} - gone
        assert set(batch) <= waiting and len(batch) == min(sizes["max_batch"], len(waiting))
        gone |= set(batch)


@given(SERVICE, SIZES)
def test_a_client_has_one_request_out_at_a_time_and_never_pauses(seconds, sizes):
    answered = FakeServer(seconds).loop(**sizes)
    for client in range(sizes["clients"]):
        own = [a for a in answered if a.request.client == client]
        assert [a.request.number for a in own] == list(range(sizes["each"]))
        assert own[0].request.arrived == 100.0
        assert all(after.request.arrived == before.done for before, after in itertools.pairwise(own))
        assert sum(a.latency for a in own) == own[-1].done - 100.0


@given(SERVICE, SIZES)
def test_waiting_counts_from_the_queue_to_the_first_token(seconds, sizes):
    server = FakeServer(seconds)
    answered = iter(server.loop(**sizes))
    for start, first, end, batch in server.calls:
        for request, a in zip(batch, answered, strict=False):
            assert a.request is request and a.batch == len(batch)
            assert a.ttft == (start - request.arrived) + (first - start) >= first - start
            assert a.latency == a.ttft + (end - first)


def test_the_order_is_that_of_the_queue():
    server = FakeServer([(1, 0)])
    server.loop(clients=3, each=2, max_batch=2)
    batches = [[(r.client, r.number) for r in batch] for *_, batch in server.calls]
    assert batches == [[(0, 0), (1, 0)], [(2, 0), (0, 1)], [(1, 1), (2, 1)]]


@given(SIZES, st.integers(0, 20))
def test_an_error_ends_the_loop_and_says_what_was_being_done(sizes, fails_at):
    whole = FakeServer([(1, 1)])
    whole.loop(**sizes)
    fails_at = min(fails_at, len(whole.calls) - 1)
    server = FakeServer([(1, 1)], fails_at=fails_at)
    with pytest.raises(ValueError, match="the model broke") as caught:
        server.loop(**sizes)
    assert len(server.calls) == fails_at
    done = sum(len(batch) for *_, batch in server.calls)
    (note,) = caught.value.__notes__
    assert f"answering {len(whole.calls[fails_at][3])} requests in one call" in note
    assert f"{done} of {sizes['clients'] * sizes['each']} requests of {sizes['clients']} clients" in note


# --- rounds of several servers -----------------------------------------------------------------------------------


def prompt(length):
    ids = torch.arange(1, length + 1)[None]
    return {"input_ids": ids, "attention_mask": ids.clamp(max=1), "pixel_values_videos": torch.zeros(1, 1)}


class Machine:
    """Servers by the name of what they take, on one clock."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def server(self, name, seconds, error=None, fails_at=0):
        calls = itertools.count()

        def generate(input_ids, streamer, max_new_tokens, **others):
            self.log.append(name)
            if error is not None and next(calls) >= fails_at:
                raise error
            streamer.put(input_ids)
            new = torch.full((len(input_ids), max_new_tokens), 7)
            for column in new.T:
                self.now += seconds
                streamer.put(column)
            streamer.end()
            return torch.cat((input_ids, new), dim=1)

        return Server(name, generate)

    def measure(self, *servers, **changed):
        arguments = {"max_batch": 2, "rounds": 3, "new_tokens": 2, "clock": lambda: self.now, **changed}
        return measure_load(servers, [prompt(3), prompt(5)], **arguments)


def test_servers_take_turns_and_the_first_round_does_not_count():
    machine = Machine()
    slow, fast = machine.measure(machine.server("slow", 4.0), machine.server("fast", 1.0))
    assert machine.log == ["slow", "slow", "fast", "fast"] * 4
    assert slow.rounds == [16.0] * 3 and fast.rounds == [4.0] * 3
    assert slow.ttft == [4.0] * 12 and slow.latency == [8.0] * 12 and fast.ttft == [1.0] * 12
    assert (slow.rate, fast.rate, slow.batch) == (4 / 16, 4 / 4, 2.0)


def cpu_memory():
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def met_while_compiling():
    error = RuntimeError("backend='inductor' raised:")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")
    return error


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "CUDA out of memory. Tried to"),
        (cpu_memory(), "can't allocate memory"),
        (met_while_compiling(), "CUDA out of memory. Tried to allocate 20.00 GiB., while"),
        (MemoryError(), "MemoryError, while"),
    ],
)
def test_who_runs_out_of_memory_has_failed_and_the_others_go_on(error, says):
    machine = Machine()
    failed, fine = machine.measure(machine.server("big", 1.0, error, fails_at=3), machine.server("small", 1.0))
    assert says in failed.failure and "answering 2 requests in one call, 2 of 4" in failed.failure
    assert failed.rate is None and machine.log.count("big") == 4
    assert fine.failure is None and len(fine.rounds) == 3


def test_any_other_error_comes_out_with_what_was_being_done():
    machine = Machine()
    with pytest.raises(RuntimeError, match="shapes differ") as caught:
        machine.measure(machine.server("fine", 1.0), machine.server("broken", 1.0, RuntimeError("shapes differ")))
    notes = "\n".join(caught.value.__notes__)
    assert "answering 2 requests in one call, 0 of 4" in notes and "load benchmark of broken" in notes
    assert machine.log == ["fine", "fine", "broken"]


def test_counts_what_is_compiled_after_the_first_round():
    machine, sizes = Machine(), iter([2, 2, 3, 3, 4, 3, 2, 2])
    plain = machine.server("plain", 1.0)
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)

    def generate(**inputs):
        function(torch.ones(next(sizes)))
        return plain.generate(**inputs)

    (result,) = machine.measure(Server("grows", generate))
    assert result.recompiles == 2


# --- the real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=2, text_layers=1)


@pytest.fixture(scope="module")
def prompts(model):
    return make_prompts(model, 5, frames=8, prompt_length=12, redundancy=0.7)


def test_every_client_has_a_video_and_a_prompt_of_its_own(model, prompts):
    assert words_of(model, prompts) == [12, 11, 10, 9, 8]
    videos = torch.cat([prompt["pixel_values_videos"] for prompt in prompts])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(videos, 2))
    assert words_of(model, make_prompts(model, 9, frames=1, prompt_length=12, redundancy=1.0))[6:] == [6, 12, 11]
    assert words_of(model, make_prompts(model, 3, frames=1, prompt_length=1, redundancy=1.0)) == [1, 1, 1]


def words_of(model, prompts):
    return [int((prompt["input_ids"] != model.config.video_token_id).sum()) for prompt in prompts]


def test_shorter_prompts_are_padded_on_the_left(prompts):
    batch = left_padded(prompts[1:4])
    for row, prompt in enumerate(prompts[1:4]):
        length = prompt["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], prompt["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * row + [1] * length
        assert torch.equal(batch["pixel_values_videos"][row], prompt["pixel_values_videos"][0])


def servers_of(model):
    """The ones that need no compiler."""
    return {server.name: server for server in make_servers(model, (0.2,), EAGER) if server.name != "inductor"}


def test_inductor_gets_the_mode(model, monkeypatch):
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **choices: given.append(choices["mode"]))
    monkeypatch.setattr(serving, "CompiledPrefill", lambda module, **choices: given.append(choices["mode"]))
    list(make_servers(model, (), {**EAGER, "mode": "reduce-overhead"}))
    assert given == ["reduce-overhead"] * 2  # the vision encoder, the language model's pass over the prompt


@dataclass
class Served:
    """What came of calling one server in several ways."""

    measured: LoadResult
    answered: list  # to ten requests, four at a time
    alone: list  # answers to the same prompts one by one
    steps: list  # of the language model: until the first token was seen, and in all
    answers: list  # of the call in which steps were counted


NAMES = ["transformers", "earlytom 0.2"]


@pytest.fixture(scope="module")
def served(model, prompts):
    """By name; every server compiles once for all tests, and none of that is to be seen in the model."""
    torch._dynamo.reset()
    before = dict(model.__dict__)
    servers = servers_of(model)
    measured = measure_load(servers.values(), prompts, max_batch=4, rounds=1, new_tokens=2)
    found = {name: serve(model, prompts, servers[name], result) for name, result in zip(NAMES, measured, strict=True)}
    assert model.__dict__ == before
    return found


def serve(model, prompts, server, measured):
    def answer(batch):
        return server.answer([prompts[request.client] for request in batch], 4, lambda: 0.0)

    answered = closed_loop(answer, clients=5, each=2, max_batch=4, clock=lambda: 0.0)
    own = server.model or model
    alone = [own.generate(**p, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, -4:].tolist() for p in prompts]
    steps = []
    hook = own.lm_head.register_forward_hook(lambda *ignored: steps.append(1))
    try:
        seen, answers = server.answer(prompts[:3], 4, lambda: len(steps))
    finally:
        hook.remove()
    return Served(measured, answered, alone, [seen, len(steps)], answers)


@pytest.mark.parametrize("name", NAMES)
def test_answers_under_load_are_those_of_single_calls(served, name):
    answered, alone = served[name].answered, served[name].alone
    assert sorted({a.batch for a in answered}) == [2, 4]
    assert [a.answer for a in answered] == [alone[a.request.client] for a in answered]
    assert len(set(map(tuple, alone))) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_first_token_is_seen_before_the_second_is_computed(served, name):
    assert served[name].steps == [1, 4] and [len(answer) for answer in served[name].answers] == [4] * 3


def test_answers_have_their_length_whatever_the_model_says(model, prompts):
    server = servers_of(model)["transformers"]
    _, (answer,) = server.answer(prompts[:1], 4, lambda: 0.0)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = answer[0]
    try:
        _, (longer,) = server.answer(prompts[:1], 4, lambda: 0.0)
    finally:
        model.generation_config.eos_token_id = before
    assert len(longer) == 4 and answer[0] not in longer[:3]


def test_batches_of_other_sizes_compile_nothing_after_the_first_round(served):
    full, compressed = (served[name].measured for name in NAMES)
    assert full.recompiles == compressed.recompiles == 0 and sorted(set(compressed.batches)) == [2, 4]
    assert len(compressed.ttft) == 10 and all(a <= b for a, b in zip(compressed.ttft, compressed.latency, strict=True))
    assert full.retention is None and len(compressed.frames) == 10
    assert {frames[0] for frames in compressed.frames} == {8} and compressed.retention < 1


def test_the_model_is_left_as_it_was(model, served):
    assert earlytom_compile.restore(model) is model


# --- what is written ---------------------------------------------------------------------------------------------


def loads():
    def result(name, clients, seconds, **more):
        waits = [seconds * (1 + i / 100) for i in range(101)]
        return LoadResult(name, 1.0, clients, [4.0, 2.0, 8.0], waits, [2 * w for w in waits], [2, 2, 1], **more)

    return [
        Load(16, 32, 9, 8, clients, [
            result("transformers", clients, 2.0),
            result("inductor", clients, 1.0),
            result("earlytom 0.1", clients, 0.5, frames=[[32, 24], [32, 16]], computed=0.3),
            LoadResult("earlytom 0.9", 0.9, clients, failure="out of memory, while [answering] 8 requests"),
        ])
        for clients in (1, 8)
    ]  # fmt: skip


def test_rows_of_the_table():
    rows = loads()[1].rows()
    assert rows[1] == (
        "inductor", "4.00", "2.00-8.00", "1.00x", "1500 / 1900 / 1990", "3000 / 3800 / 3980", "1.5", "", "",
        "0",
    )  # fmt: skip
    assert rows[2][4] == "750 / 950 / 995" and rows[2][-3:-1] == ("62%", "30%")
    assert rows[3] == ("earlytom 0.9", "failed", *[""] * 8)
    table = load_table(loads()[1])
    assert table.row_count == 4 and "while \\[answering] 8" in table.caption


def test_without_the_reference_there_is_no_speed():
    load = loads()[0]
    load.results[1].failure = "out of memory"
    assert [row[3] for row in load.rows()] == [""] * 4


def test_json_and_markdown_hold_the_numbers():
    about = {"command": "earlytom bench", "machine": "x", "date": "2026-01-01"}
    content = json.loads(json.dumps(load_to_dict(loads(), about)))
    full, failed = content["loads"][1]["results"][1], content["loads"][1]["results"][3]
    assert full["requests_per_second"] == 4.0 and full["ttft_percentiles"] == pytest.approx([1.5, 1.9, 1.99])
    assert full["rounds"] == [4.0, 2.0, 8.0] and content["loads"][0]["concurrency"] == 1 and content["machine"] == "x"
    assert failed["requests_per_second"] is None and "answering" in failed["failure"]
    text = load_to_markdown(loads(), about)
    assert "| inductor | 4.00 | 2.00-8.00 | 1.00x | 1500 / 1900 / 1990 |" in text and "machine x" in text
    assert text.count("| model |") == 2 and text.count("- earlytom 0.9: out of memory") == 2


def test_plots_are_pictures_a_video_length_each(tmp_path):
    pytest.importorskip("matplotlib")
    (written,) = write_load_plots(loads(), tmp_path / "plots")
    assert written.name == "load-16-frames.png" and written.read_bytes().startswith(b"\x89PNG")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What each server answered and compiled, by its name: [(answers, graphs), ...]."""
    seen, answer = defaultdict(list), Server.answer

    def recording(server, *args):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        served = answer(server, *args)
        seen[server.name].append((served[1], torch._dynamo.utils.counters["stats"]["unique_graphs"] - before))
        return served

    monkeypatch.setattr(Server, "answer", recording)
    return seen


@pytest.mark.long  # the dry run in test_gpu.py ends with it, but for Inductor's arm
@pytest.mark.parametrize("compiler", ["Dynamo", "Inductor"])
def test_bench_under_load_prints_and_writes_every_model(tmp_path, capsys, calls, monkeypatch, compiler):
    if compiler == "Dynamo":
        leave_graphs_as_they_are(monkeypatch)
    size = TinySize(image=32, patch=16, vision_layers=3, vision_width=32, text_layers=1, text_width=64)
    checkpoint = str(write_checkpoint(tmp_path / "tiny", size))
    files = {name: tmp_path / f"load.{name}" for name in ("json", "markdown")}
    arguments = ["bench", "--model", checkpoint, "--frames", "4", "--repeats", "1", "--decode-tokens", "1"]
    arguments += ["--concurrency", "3", "--max-batch", "2", "--retain-ratios", "0.25", "--lowering", "eager"]
    for name, path in files.items():
        arguments += [f"--{name}", str(path)]
    assert main(arguments) == 0
    printed, text = capsys.readouterr().out, files["markdown"].read_text()
    content = json.loads(files["json"].read_text())
    (load,) = content["loads"]
    assert content["seconds"] > 0 and content["scene_frames"] == 4 and f"{content['seconds']:.0f} s in all" in printed
    names = ["transformers", "inductor", "earlytom 0.25"]
    assert [result["name"] for result in load["results"]] == names
    assert all(name in printed and f"| {name} |" in text for name in names)
    for result in load["results"]:
        assert result["failure"] is None and result["recompiles"] == 0
        assert len(result["ttft"]) == 6 and result["batches"] == [2] * 6 and min(result["ttft"]) > 0
    assert load["results"][2]["frames"][0][0] == 4
    answers, compiled = ({name: [call[i] for call in calls[name]] for name in names} for i in range(2))
    assert answers["inductor"] == answers["transformers"] and len(answers["inductor"]) == 6
    assert sum(compiled["transformers"]) == 0
    assert compiled["inductor"][0] == 2  # the vision encoder, the language model's pass over the prompt
    assert compiled["earlytom 0.25"][0] >= 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--concurrency", "0"], "concurrency=0: must be at least 1 client"),
        (["--concurrency", "8,-1"], "concurrency=-1: must be at least 1 client"),
        (["--concurrency", "8", "--max-batch", "0"], "max_batch=0: must be at least 1"),
        (["--concurrency", "8", "--batch", "2"], "batch=2 with --concurrency: the queue makes the batches"),
    ],
)
def test_bench_says_what_is_wrong(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("given", ["many", "", "1,,8", "1.5"])
def test_what_is_no_number_of_clients_is_said_at_once(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--concurrency", given])
    assert stopped.value.code == 2
    assert f"{given!r}: must be numbers with commas between, as 8,16" in capsys.readouterr().err
