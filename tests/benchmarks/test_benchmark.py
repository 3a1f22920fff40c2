"""What is compared is what it says, it is measured in turn, and the numbers come out as they went in."""

import dataclasses
import io
import json
import math
import warnings
from types import FunctionType
from weakref import WeakSet

import pytest
import torch
from generating import share_vision_paths, trace_of_video_rows
from rich.console import Console
from tiny_models import tiny_llava_onevision, tokens_per_frame
from without_inductor import leave_graphs_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomConfigError
from earlytom_compile.benchmarks import measure as measuring
from earlytom_compile.benchmarks.arms import (
    Arm,
    choose,
    make_arms,
)
from earlytom_compile.benchmarks.breakdown import STAGES, Breakdown
from earlytom_compile.benchmarks.floor import Floor
from earlytom_compile.benchmarks.measure import Result, decode, measure
from earlytom_compile.benchmarks.result_plots import (
    _plot_against_flops,
    _plot_against_frames,
    _plot_stages,
    write_plots,
)
from earlytom_compile.benchmarks.results import Workload, tables, to_dict, to_markdown
from earlytom_compile.benchmarks.workload import make_inputs, make_video, random_model
from earlytom_compile.shapes import config_of

EAGER = {"variant": "paper", "lowering": "eager", "merge_layers": (0, 1), "tau_seg": 0.3}


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=2, text_layers=1)


def arms_of(model, inputs, ratios=(0.2,)):
    return {arm.name: arm for arm in make_arms(model, inputs, ratios, EAGER)}


def test_redundancy_is_the_share_of_a_frame_that_is_its_scene():
    still, noise = (
        make_video(16, 8, torch.Generator().manual_seed(0), scene_frames=8, redundancy=redundancy)
        for redundancy in (1.0, 0.0)
    )
    assert torch.equal(still[:8], still[:1].expand(8, -1, -1, -1)) and not torch.equal(still[7], still[8])
    similarity = torch.cosine_similarity(noise[:-1].flatten(1), noise[1:].flatten(1))
    assert similarity.abs().max() < 0.3
    with pytest.raises(EarlyTomConfigError, match=r"redundancy=1.5: must be in \[0, 1\]"):
        make_video(4, 8, torch.Generator(), redundancy=1.5)
    with pytest.raises(EarlyTomConfigError, match="scene_frames=0: must be at least 1"):
        make_video(4, 8, torch.Generator(), scene_frames=0)


LOOKS = {"scenes of 4": {}, "scenes of 8": {"scene_frames": 8}, "noise": {"redundancy": 0.0}}


@pytest.fixture(scope="module")
def merged():
    """Numbers of frames, layer by layer, for each of LOOKS; one compilation serves them all."""
    model = random_model(config_of("cpu-small"), device="cpu", dtype=torch.float32)
    compressed = earlytom_compile.compile(model, retain_ratio=0.1, variant="paper", lowering="eager")
    found = {}
    for name, look in LOOKS.items():
        earlytom_compile.encode_videos(compressed, make_inputs(model, frames=16, **look)["pixel_values_videos"])
        (video,) = earlytom_compile.report(compressed).to_dict()["videos"]
        found[name] = video["frames"]
    return found


@pytest.mark.long  # the model is not a tiny one: the schedule is that of the documented numbers
@pytest.mark.parametrize(
    "look, schedule", [("scenes of 4", [16, 12, 12, 12]), ("scenes of 8", [16, 10, 8, 6]), ("noise", [16] * 4)]
)
def test_the_default_video_merges_to_three_quarters(merged, look, schedule):
    assert merged[look] == schedule


def test_inputs_are_what_a_processor_would_give(model):
    inputs = make_inputs(model, frames=8, batch=2, prompt_length=7)
    placeholders = (inputs["input_ids"] == model.config.video_token_id).sum(1)
    assert placeholders.tolist() == [8 * tokens_per_frame(model) + 1] * 2
    assert inputs["input_ids"].shape[1] == placeholders[0] + 7
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_model_is_made_in_the_dtype_it_is_used_in(model):
    made = random_model(model.config, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert not made.training and torch.get_default_dtype() == torch.float32


@dataclasses.dataclass
class Called:
    """Every arm, and what came of measuring it and of one more call."""

    inputs: dict
    arms: dict
    results: dict
    first: dict
    before: dict  # the model's attributes
    after: dict


@pytest.fixture(scope="module", params=["Dynamo", pytest.param("Inductor", marks=pytest.mark.long)])
def called(request, model):
    torch._dynamo.reset()
    inputs, before = make_inputs(model, frames=12, batch=2, redundancy=0.7), dict(model.__dict__)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if request.param == "Dynamo":
            leave_graphs_as_they_are(patch)
            share_vision_paths(trace_of_video_rows(), patch)
        warnings.simplefilter("ignore", DeprecationWarning)
        arms = arms_of(model, inputs)
        results = {result.name: result for result in measure(model, arms.values(), repeats=2, decode_tokens=2)}
        with torch.inference_mode():
            first = {name: arm.first_token() for name, arm in arms.items()}
    return Called(inputs, arms, results, first, before, dict(model.__dict__))


def test_arms_do_what_they_are_called(model, called):
    inputs, first = called.inputs, called.first
    assert list(called.arms) == [
        "transformers", "inductor", "earlytom 0.2", "earlytom 0.2 (backend)", "earlytom reuse 0.2", "subsampling 0.2",
        "average pooling 0.2",
    ]  # fmt: skip
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert torch.equal(first["transformers"][0], logits[:, -1:].argmax(-1))
    assert torch.equal(first["inductor"][0], first["transformers"][0])
    assert torch.equal(first["earlytom 0.2"][0], first["earlytom 0.2 (backend)"][0])
    words, full = 32, 12 * tokens_per_frame(model)
    lengths = {name: cache.get_seq_length() for name, (_, cache) in first.items()}
    assert lengths["transformers"] == lengths["inductor"] == full + 1 + words
    assert lengths["earlytom 0.2"] == lengths["earlytom 0.2 (backend)"] == round(0.2 * full) + 1 + words
    # 2 whole frames: 1 or 3 would be further from the tokens that are kept.
    fewer = min((1, 2, 3), key=lambda frames: abs(frames * tokens_per_frame(model) - round(0.2 * full)))
    assert lengths["subsampling 0.2"] == lengths["average pooling 0.2"] == fewer * tokens_per_frame(model) + 1 + words
    assert not torch.equal(first["subsampling 0.2"][1].layers[0].keys, first["average pooling 0.2"][1].layers[0].keys)


def test_measures_the_real_arms(called):
    full, compressed = called.results["transformers"], called.results["earlytom 0.2"]
    assert full.retention is None and full.frames == []
    assert [video[0] for video in compressed.frames] == [12, 12]
    assert compressed.retention == sum(video[-1] for video in compressed.frames) / 24
    for result in called.results.values():
        assert len(result.ttft) == 2 and result.decode_rate > 0 and result.recompiles == 0
    assert compressed.cold > compressed.median


def test_the_model_is_left_as_it_was(model, called):
    # Of torch's own: its wrapper hands what is set on it to the model, and torch 2.11 sets nothing.
    after = {name: value for name, value in called.after.items() if name != "_is_torch_compile"}
    assert after == called.before and earlytom_compile.restore(model) is model


def test_every_compiled_arm_gets_the_mode(model, monkeypatch):
    given, compiler = [], torch.compile

    def recording(*args, **choices):
        given.append(choices.get("mode") or choices.get("options", {}).get("mode"))
        return compiler(*args, **choices)

    monkeypatch.setattr(torch, "compile", recording)
    list(make_arms(model, make_inputs(model, frames=8), (0.2,), {**EAGER, "mode": "reduce-overhead"}))
    assert given == ["reduce-overhead"] * 2  # inductor and what runs on it; earlytom as a backend


def test_arms_are_chosen_by_how_their_names_begin(model):
    arms = list(make_arms(model, make_inputs(model, frames=8), (0.2, 0.1), EAGER))
    assert choose(arms, ()) == arms
    names = [arm.name for arm in choose(arms, ("earlytom 0.2", "transformers"))]
    assert names == ["transformers", "earlytom 0.2", "earlytom 0.2 (backend)"]
    with pytest.raises(EarlyTomConfigError, match="arms='earlytom 0.3': no arm begins so; there are transformers, in"):
        choose(arms, ("transformers", "earlytom 0.3"))


def test_arms_share_the_weights(model):
    arms = arms_of(model, make_inputs(model, frames=8))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for arm in arms.values():
        assert {parameter.data_ptr() for parameter in arm.model.parameters()} == own
    assert "_earlytom" not in model.__dict__


def test_decoding_says_what_generate_says(model):
    inputs = make_inputs(model, frames=8, batch=2)
    with torch.inference_mode():
        arm = arms_of(model, inputs)["transformers"]
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[:, -5:]
        assert torch.equal(decode(model, arm.first_token(), 4), expected)


class Cache:
    def get_seq_length(self):
        return 3


def test_arms_take_turns_and_the_first_call_is_told_apart(model, monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def arm(name, seconds):
        def first_token():
            calls.append(name)
            now[0] += seconds.pop(0)
            return torch.tensor([[1]]), Cache()

        return Arm(name, first_token)

    arms = [arm("a", [9.0, 1.0, 1.0, 2.0, 3.0]), arm("b", [7.0, 1.0, 5.0, 5.0, 5.0])]
    a, b = measure(model, arms, repeats=3, decode_tokens=0)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert (a.cold, a.ttft, a.median) == (9.0, [1.0, 2.0, 3.0], 2.0)
    assert (b.cold, b.ttft, b.decode_rate, b.cache_tokens) == (7.0, [5.0] * 3, None, 3)


@pytest.mark.parametrize("separable", [True, False])
def test_the_encoders_time_ends_where_the_projectors_first_product_begins(model, monkeypatch, separable):
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    inner = model.model
    tower, projector, decoder = (
        next(weight for weight in part.parameters() if weight.dim() == 2)
        for part in (inner.vision_tower.encoder, inner.multi_modal_projector, inner.language_model.layers[0])
    )
    # Two videos, one after the other: seconds, then a product with this weight.
    steps = [(5, tower), (2, projector), (1, tower), (4, projector), (1, decoder)] if separable else [(13, tower)]

    def first_token():
        for seconds, weight in steps:
            now[0] += seconds
            torch._C._nn.linear(torch.ones(1, weight.shape[1]), weight)
        now[0] += 3
        return torch.tensor([[1]]), Cache()

    (result,) = measure(model, [Arm("a", first_token)], repeats=2, decode_tokens=0)
    assert result.ttft == [16, 16] and result.encoder == ([11, 11] if separable else [])
    assert result.encoder_median == (11 if separable else None)


def test_the_encoder_of_every_arm_is_a_part_of_its_call(called):
    for name, result in called.results.items():
        assert len(result.encoder) == len(result.ttft) == 2, name
        assert all(0 < encoder < ttft for encoder, ttft in zip(result.encoder, result.ttft, strict=True)), name


def test_every_arm_compiles_cold_and_says_how_long_that_took(model, tmp_path):
    def arm(name):
        # A product is a graph for Inductor and its caches, but none of which g++ has to compile a kernel.
        code = (lambda x: x @ x).__code__.replace()  # Dynamo compiles one code object once
        function = torch.compile(FunctionType(code, globals()), dynamic=False)
        return Arm(name, lambda: (function(torch.ones(8, 8))[:1, :1].long(), Cache()))

    plain = Arm("plain", lambda: (torch.ones(1, 1).long(), Cache()))
    results = measure(model, [plain, arm("a"), arm("b")], repeats=1, decode_tokens=0, caches=str(tmp_path))
    assert results[0].compilation == 0 and len(list(tmp_path.iterdir())) == 3
    for result in results[1:]:
        assert 0 < result.compilation < result.cold and result.compilation > 100 * result.median
    counts = torch._dynamo.utils.counters["inductor"]
    assert counts["fxgraph_cache_miss"] == 2 and counts["fxgraph_cache_hit"] == 0


@pytest.mark.parametrize("sizes, later", [([2, 2, 3, 3, 4], 2), ([2, 3, 3, 3, 3], 1), ([2, 2, 2, 2, 2], 0)])
def test_counts_what_is_compiled_after_the_first_call(model, sizes, later):
    function, sizes = torch.compile(lambda x: x + 1, backend="eager", dynamic=False), iter(sizes)
    arm = Arm("grows", lambda: (function(torch.ones(next(sizes))).long()[None, :1], Cache()))
    (result,) = measure(model, [arm], repeats=3, decode_tokens=0)
    assert result.recompiles == later


def test_no_cache_outlives_its_call(model):
    alive, seen = WeakSet(), []

    def first_token():
        seen.append(len(alive))
        cache = Cache()
        alive.add(cache)
        return torch.tensor([[1]]), cache

    measure(model, [Arm("a", first_token), Arm("b", first_token)], repeats=2, decode_tokens=0)
    assert seen == [0] * 8


@pytest.mark.parametrize("fails_at", [0, 1, 2, 4])
def test_who_runs_out_of_memory_has_failed_and_the_others_go_on(model, fails_at):
    calls = []

    def arm(name, fails_at=None):
        def first_token():
            if calls.count(name) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")
            calls.append(name)
            return torch.tensor([[1]]), Cache()

        return Arm(name, first_token)

    big, small = measure(model, [arm("big", fails_at), arm("small")], repeats=3, decode_tokens=0)
    assert big.failure == "CUDA out of memory. Tried to allocate 20.00 GiB." and calls.count("big") == fails_at
    assert small.failure is None and len(small.ttft) == 3


def test_any_other_error_comes_out(model):
    def first_token():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(model, [Arm("broken", first_token)], repeats=1, decode_tokens=0)


def test_all_rows_decode_together(model):
    arm = next(make_arms(model, make_inputs(model, frames=4, batch=3), (), EAGER))
    (result,) = measure(model, [arm], repeats=1, decode_tokens=2)
    assert result.decode_rate == 3 / result.decode[0]


def workloads():
    def result(name, seconds, **more):
        ratio = 0.1 if "0.1" in name else 1.0
        times = {"cold": 4.0, "compilation": 2.5, "ttft": seconds, "decode": [0.05, 0.05]}
        return Result(name, ratio, cache_tokens=100, **times, **more)

    return [
        Workload(frames, 1, 32, [
            result("inductor", [0.4, 0.5, 0.6], breakdown=Breakdown(0.6, 0.2, None, 400 << 20),
                   floor=Floor(2e12, 3e9, 0.25, 1.6e12, 2.5e12), encoder=[0.2, 0.25, 0.3]),
            result("earlytom 0.1", [0.1, 0.1, 0.2], frames=[[32, 24], [32, 16]], peak_memory=3 << 30,
                   breakdown=Breakdown(0.2, 0.05, dict(zip(STAGES, (0.1, 0.02, 0.03), strict=True)), 100 << 20,
                                       dict(zip(STAGES, (100 << 20, 3 << 19, 2 << 20), strict=True))),
                   floor=Floor(1e12, 2e9, 0.08, 0.8e12, 1.1e12), encoder=[0.07, 0.08, 0.1]),
        ], "bfloat16", {"matmul": 8e12, "copy": 4e9})
        for frames in (8, 16)
    ]  # fmt: skip


def test_rows_of_the_table():
    full, compressed = workloads()[0].rows()
    assert full == ("inductor", "2.5", "4.0", "500", "400-600", "1.00x", "", "", "67", "20.0", "0")
    assert compressed == ("earlytom 0.1", "2.5", "4.0", "100", "100-200", "5.00x", "", "62%", "67", "20.0", "0")
    workload = workloads()[0]
    workload.results.append(Result("transformers", 1.0, ttft=[0.9, 1.0, 1.2]))
    assert [row[5:7] for row in workload.rows()] == [("1.00x", "2.00x"), ("5.00x", "10.00x"), ("0.50x", "1.00x")]
    del workload.results[0]
    assert [row[5:7] for row in workload.rows()] == [("", "10.00x"), ("", "1.00x")]


def with_a_failure():
    workload = workloads()[0]
    workload.results.insert(0, Result("transformers", 1.0, failure="out of [memory]"))
    return workload


def test_a_failed_arm_has_a_row_that_says_so(tmp_path):
    failed, full, compressed = with_a_failure().rows()
    assert failed == ("transformers", "failed", *[""] * 9)
    assert full[5:7] == ("1.00x", "") and compressed[5:7] == ("5.00x", "")
    assert tables(with_a_failure())[0].caption == "transformers: out of \\[memory]"
    assert "- transformers: out of [memory]\n" in to_markdown([with_a_failure()], {"command": "earlytom bench"})
    (content,) = to_dict([with_a_failure()], {})["workloads"]
    assert content["results"][0]["failure"] == "out of [memory]" and content["results"][0]["video_tokens"] is None
    pytest.importorskip("matplotlib")
    assert len(write_plots([with_a_failure(), with_a_failure()], tmp_path)) == 5


def test_rows_of_the_table_of_memory():
    full, compressed = workloads()[0].memory_rows()
    assert full == ("inductor", "", "", "", "400.0 (100%)", "")
    assert compressed == ("earlytom 0.1", "100.0", "1.5", "2.0", "100.0 (25%)", "3.00")
    stages = dict(zip(STAGES, (200 << 20, 100 << 20, 1 << 20), strict=True))
    workload = workloads()[0]
    workload.results[0].breakdown = Breakdown(0.6, 0.2, None, 400 << 20, stages)
    assert workload.memory_rows()[1][1:4] == ("100.0 (50%)", "1.5 (2%)", "2.0 (200%)")


def test_rows_of_the_table_of_stages():
    full, compressed = workloads()[0].breakdown_rows()
    assert full == ("inductor", "not separable", "", "", "200 (33%)", "600", "2", "100%", "3", "250", "2.00")
    stages = ("100 (50%)", "20.0 (10%)", "30.0 (15%)", "50.0 (25%)")
    assert compressed == ("earlytom 0.1", *stages, "200", "1", "50%", "2", "80.0", "1.25")
    alone = dataclasses.replace(workloads()[0], results=workloads()[0].results[1:])
    assert alone.breakdown_rows()[0][6:8] == ("1", "")
    assert "8 TFLOP/s (bfloat16) and 4 GB/s" in workloads()[0].breakdown_title


def test_rows_of_the_table_of_the_encoder():
    full, compressed = workloads()[0].encoder_rows()
    assert full == ("inductor", "", "250", "200-300", "100%", "1.6", "100%", "1.00")
    assert compressed == ("earlytom 0.1", "", "80.0", "70.0-100", "32%", "0.8", "50%", "0.64, met")
    workload = workloads()[0]
    workload.results[1].encoder, workload.results[1].patches = [0.2], [[800, 200, 8], [400, 160, 8]]
    assert workload.encoder_rows()[1][1::6] == ("30%", "1.60, MISSED")
    (content,) = to_dict([workload], {})["workloads"]
    assert content["results"][1]["encoder_shares"] == {"time": pytest.approx(0.8), "work": 0.5}
    workload.results[0].encoder = []  # its stages were launched as one
    alone = ("earlytom 0.1", "30%", "200", "200-200", "", "0.8", "", "")
    assert workload.encoder_rows() == [("inductor", *[""] * 7), alone]


def test_rows_of_the_table_of_tokens_and_operations():
    full, compressed = workloads()[0].cost_rows()
    assert full == ("inductor", "67", "67", "100%", "2.5", "100%", "500", "100%")
    assert compressed == ("earlytom 0.1", "67", "67", "100%", "1.1", "44%", "100", "20%")
    workload = workloads()[0]
    # 68 rows of the video, newline included, in 3 layers of 5; 34 and 17 in the others.
    workload.results[1].layer_tokens = [100, 100, 100, 32 + 34, 32 + 17]
    assert workload.cost_rows()[1][1:4] == ("67", "50", "75%")
    assert workload.results[1].starts == {0: 100, 3: 66, 4: 49}
    (content,) = to_dict([workload], {})["workloads"]
    assert content["results"][1]["video_tokens_of_a_layer"] == pytest.approx((3 * 67 + 34 + 17) / 5)
    workload.results.append(Result("fastv 0.1", 0.1, failure="out of memory"))
    assert workload.cost_rows()[2] == ("fastv 0.1", *[""] * 7)
    workload.results[0].floor = workload.results[1].floor = None
    assert [row[4:6] for row in workload.cost_rows()[:2]] == [("", "")] * 2


def test_points_stand_over_exact_operations_and_say_how_many_tokens():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    workload = workloads()[0]
    workload.results[1].layer_tokens = [100, 32 + 34]
    figure = _plot_against_flops(pyplot, workload)
    (axes,) = figure.axes
    points = {points.get_label(): points.get_offsets().tolist() for points in axes.collections}
    assert points == {"inductor: 67 tokens": [[2.5, 500]], "earlytom 0.1: 50 tokens": [[1.1, 100]]}
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 2.5] and list(line.get_ydata()) == [0, 1e3 * 2.5e12 / 8e12]
    pyplot.close(figure)


def test_arms_that_nobody_profiled_leave_their_cells_empty():
    workload = Workload(8, 1, 32, [Result("inductor", 1.0, ttft=[0.5])])
    assert workload.breakdown_rows() == [("inductor", *[""] * 10)]
    assert workload.memory_rows() == [("inductor", *[""] * 5)]
    assert workload.encoder_rows() == [("inductor", *[""] * 7)]
    assert "floor" not in workload.breakdown_title


@pytest.mark.parametrize(
    "work", [Floor(119.6e12, 17.3e9, 0.156, 17.2e12, 119.9e12), Floor(0.00341e12, 0.0636e9, 0.103, 1e9, 0.00345e12)]
)
def test_tables_fit_into_120_columns(work):
    """Names and numbers as long as those of a 7B model, work as small as that of a tiny one."""
    long = Result("earlytom 0.25 (backend)", 0.25, cold=148.2, compilation=139.5, ttft=[1.08, 1.09, 1.15],
                  decode=[0.012], cache_tokens=6305, peak_memory=23 << 30, frames=[[32, 24]],
                  encoder=[0.48, 0.49], patches=[[23328, 11664]],
                  breakdown=Breakdown(1.2, 0.12, dict(zip(STAGES, (0.48, 0.12, 0.48), strict=True)), 9 << 30,
                                      dict.fromkeys(STAGES, 9 << 30)),
                  floor=work)  # fmt: skip
    full = [dataclasses.replace(long, name=name, retain_ratio=1.0) for name in ("transformers", "inductor")]
    workload = Workload(32, 1, 32, [*full, long], "bfloat16", {"matmul": 7.1e14, "copy": 4.1e12})
    console = Console(width=120, file=io.StringIO())
    for printed in tables(workload):
        console.print(printed)
    assert "…" not in console.file.getvalue()
    lines = console.file.getvalue().splitlines()
    for row in (rows[2] for _, _, rows in workload.sections()):
        assert any(line.split() == " ".join(row).split() for line in lines)


def test_json_and_markdown_hold_the_numbers():
    about = {"command": "earlytom bench", "machine": "x", "date": "2026-01-01"}
    content = json.loads(json.dumps(to_dict(workloads(), about)))
    assert content["workloads"][0]["results"][0]["ttft"] == [0.4, 0.5, 0.6] and content["date"] == "2026-01-01"
    assert content["workloads"][0]["results"][1]["breakdown"]["stages"]["vision encoding"] == 0.1
    assert content["workloads"][0]["results"][1]["breakdown"]["stage_memory"]["LLM prefill"] == 2 << 20
    assert content["workloads"][1]["results"][0]["floor"] == {
        "flops": 2e12, "bytes": 3e9, "seconds": 0.25, "encoder_flops": 1.6e12, "exact_flops": 2.5e12,
    }  # fmt: skip
    assert content["workloads"][0]["results"][1]["share_of_full_flops"] == 0.5
    assert content["workloads"][0]["results"][1]["speed"] == {"inductor": 5.0, "transformers": None}
    assert content["workloads"][0]["ceilings"] == {"matmul": 8e12, "copy": 4e9}
    assert [result["video_tokens"] for result in content["workloads"][0]["results"]] == [67, 67]
    text = to_markdown(workloads(), about)
    assert "| earlytom 0.1 | 100 (50%) | 20.0 (10%) | 30.0 (15%) | 50.0 (25%) | 200 |" in text
    assert "| earlytom 0.1 | 2.5 | 4.0 | 100 | 100-200 | 5.00x |  | 62% |" in text and "machine x" in text
    assert "| earlytom 0.1 | 100.0 | 1.5 | 2.0 | 100.0 (25%) | 3.00 |" in text
    assert "| earlytom 0.1 |  | 80.0 | 70.0-100 | 32% | 0.8 | 50% | 0.64, met |" in text
    assert text.count("| arm |") == 10


def test_plots_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    written = write_plots(workloads(), tmp_path / "plots")
    names = [f"{kind}-{frames}-frames" for frames in (8, 16) for kind in ("ttft", "ttft-against-flops")]
    assert [path.stem for path in written] == [*names, "cost-against-frames"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_costs_stand_over_their_frames():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = _plot_against_frames(pyplot, workloads())
    time, vision, call = figure.axes
    assert [label.get_text() for label in time.get_xticklabels()] == ["8", "16"]
    assert [list(line.get_ydata()) for line in time.lines] == [[500, 500], [100, 100]]
    assert list(vision.lines[1].get_ydata()) == [100, 100] and list(call.lines[0].get_ydata()) == [400, 400]
    assert all(math.isnan(peak) for peak in vision.lines[0].get_ydata())  # its stages are not known
    pyplot.close(figure)


def test_bars_are_the_parts_one_after_the_other():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = _plot_stages(pyplot, workloads()[0])
    bars = {}
    for bar in figure.axes[0].patches:
        if bar.get_width():
            bars.setdefault(bar.get_y(), []).append((bar.get_x(), bar.get_width()))
    compressed, full = (bars[y] for y in sorted(bars))
    assert [width for _, width in compressed] == pytest.approx([100, 20, 30, 50])
    assert [begin for begin, _ in compressed] == pytest.approx([0, 100, 120, 150])
    assert full == [(0, pytest.approx(400)), (pytest.approx(400), pytest.approx(200))]
    pyplot.close(figure)
