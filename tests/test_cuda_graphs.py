"""CUDA graphs without a GPU: a fake that records a callable and, as they do, writes where it wrote before."""

import contextlib
import math
import threading
from functools import partial
from unittest import mock

import pytest
import torch
from effort import examples
from hypothesis import example, given
from hypothesis import strategies as st
from one_trace import OneTrace
from oracle import compressed_forward, compressed_generate
from tiny_models import tiny_llava_onevision, video_inputs
from torch import nn

import earlytom_compile
from earlytom_compile import EarlyTomFallbackWarning, cuda_graphs, report, stages
from earlytom_compile.backend import earlytom
from earlytom_compile.cuda_graphs import GraphedRun, bucket, fewest_of_bucket
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.passes.find_capturable import Signature
from earlytom_compile.reporting import GraphRecord


class FakeGraphs:
    """Replays overwrite their own results and destroy those of all others, which live in the same memory."""

    def __init__(self, graph_seconds=1.0, plain_seconds=2.0, reason=None):
        self.graph_seconds, self.plain_seconds, self.reason = graph_seconds, plain_seconds, reason
        self.captured, self.replays, self.timed = [], 0, []

    def reason_not_now(self):
        return self.reason

    def capture(self, run):
        made = [_spoil(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)) for x in run()]
        self.captured.append(made)

        @torch.inference_mode()  # where anything may be written to, as a GPU does
        def replay():
            self.replays += 1
            for memory in (x for graph in self.captured for x in graph):
                _spoil(memory)
            for memory, x in zip(made, run(), strict=True):
                memory.copy_(x)

        return made, replay

    def seconds(self, call):
        before = self.replays
        call()
        self.timed.append(self.replays > before)
        return self.graph_seconds if self.timed[-1] else self.plain_seconds


def _spoil(x):
    return x.fill_(math.nan) if x.is_floating_point() else x.fill_(0)


def padded_with_nan(buffer, x):
    """Stands in for what a call writes to a graph's input."""
    if x.dim():
        buffer = _spoil(buffer)[: len(x)]
    buffer.copy_(x)


def frames_times_weight(frames, weight, scale, count):
    """[n, 2, 3], [3], [3], n -> [n, 2, 3], [3]"""
    assert len(frames) == count
    return frames * weight + scale, weight + scale


SIGNATURE = Signature(("frames", "weight", "tensor", "count"), (True, False))


def graphed(run=frames_times_weight, signature=SIGNATURE, most=16, device=None, least=1):
    frames = range(least, most + 1)
    return GraphedRun(run, signature, frames, device or FakeGraphs(), "layers", GraphRecord("", False))


WEIGHT = torch.randn(3)


def arguments(count, seed=0, weight=WEIGHT):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 2, 3, generator=generator), weight, torch.randn(3, generator=generator), count]


def repeat(run, args, times=3):
    """Call often enough for a graph to be captured; the results of the last call."""
    for _ in range(times):
        results = run(*args)
    return results


def assert_right(results, args):
    for actual, expected in zip(results, frames_times_weight(*args), strict=True):
        assert actual.shape == expected.shape and actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@given(most=st.integers(1, 300), data=st.data())
def test_buckets_are_few_and_waste_little(most, data):
    count = data.draw(st.integers(1, most))
    size = bucket(count, most)
    assert count <= size <= most and 8 * (size - count) < most
    assert len({bucket(n, most) for n in range(1, most + 1)}) <= 8
    assert fewest_of_bucket(size, most) == min(n for n in range(1, most + 1) if bucket(n, most) == size)


CALLS = st.lists(
    st.one_of(st.integers(1, 16), st.sampled_from(["update the weight", "replace the weight"])), min_size=1, max_size=25
)


@given(CALLS, st.booleans())
@example([9, 9, 9, 10, "update the weight", 9, "replace the weight", 9, 9, 9, 16, 16, 1, 16, 9], True)
@examples(60)
def test_every_result_is_right_and_stays_so(calls, faster):
    device = FakeGraphs() if faster else FakeGraphs(3.0, 2.0)
    run, weight, kept = graphed(device=device), torch.randn(3), []
    with mock.patch.object(cuda_graphs, "_fill", padded_with_nan):
        for seed, call in enumerate(calls):
            if call == "update the weight":
                weight.copy_(torch.randn(3))
            elif call == "replace the weight":
                weight = torch.randn(3)
            else:
                args = arguments(call, seed, weight)
                kept.append((run(*args), frames_times_weight(*args)))
    for results, expected in kept:
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)
    assert not device.captured or device.replays


def test_the_first_call_is_plain_the_second_captures_and_later_ones_replay():
    device = FakeGraphs()
    run, args = graphed(device=device), arguments(5)
    run(*args)
    assert not device.captured
    run(*args)
    replays = device.replays
    assert len(device.captured) == 1 and any(device.timed) and not all(device.timed)
    assert_right(run(*args), args)
    assert device.replays == replays + 1
    fewer = arguments(6)  # the same bucket
    assert_right(run(*fewer), fewer)
    assert len(device.captured) == 1 and device.replays == replays + 2


def test_a_graph_that_is_not_faster_is_not_replayed():
    device = FakeGraphs(graph_seconds=2.0, plain_seconds=2.0)
    run, args = graphed(device=device), arguments(5)
    repeat(run, args)
    replays = device.replays
    assert_right(repeat(run, args), args)
    assert device.replays == replays and len(device.captured) == 1
    (timed,) = run._record.cuda_graphs
    assert not timed.used and timed.part == "layers, 6 frames"


@pytest.mark.parametrize("least, fewest", [(1, 9), (10, 10)])
def test_plain_calls_are_timed_with_the_fewest_frames_of_the_bucket(least, fewest):
    counts = []

    def run(frames, *rest):
        counts.append(len(frames))
        return frames_times_weight(frames, *rest)

    repeat(graphed(run, most=32, least=least), arguments(12), times=2)
    assert set(counts) == {12, fewest}  # 12 is its own bucket, of 9 to 12 frames


def test_a_capture_that_fails_is_told_and_not_tried_again():
    device = FakeGraphs()
    device.capture = mock.Mock(side_effect=RuntimeError("operation not permitted when stream is capturing\nmore"))
    run, args = graphed(device=device), arguments(5)
    run(*args)
    with pytest.warns(EarlyTomFallbackWarning, match="no CUDA graph of layers: RuntimeError: operation not permitted"):
        assert_right(run(*args), args)
    assert_right(repeat(run, args), args)
    other = arguments(9)
    assert_right(repeat(run, other), other)
    assert device.capture.call_count == 1 and len(run._record.reasons) == 1


@pytest.mark.parametrize(
    "frames, reason",
    [
        (torch.randn(2, 3, 5).permute(2, 0, 1), "outermost"),
        (torch.randn(5, 1, 3).expand(5, 2, 3), "single memory location"),
    ],
)
def test_memory_that_a_buffer_cannot_imitate_runs_plainly(frames, reason):
    run, args = graphed(), [frames, *arguments(5)[1:]]
    run(*args)
    with pytest.warns(EarlyTomFallbackWarning, match=reason):
        assert_right(run(*args), args)
    assert_right(run(*args), args)


@pytest.mark.parametrize("promised", [{"most": 4}, {"least": 6}])
def test_frame_counts_that_were_not_promised_run_plainly(promised):
    run, args = graphed(**promised), arguments(5)
    assert_right(repeat(run, args), args)
    assert not run._device.captured


def test_where_no_graph_may_be_replayed_calls_are_plain_and_the_report_says_why():
    device = FakeGraphs(reason="on another stream")
    run, args = graphed(device=device), arguments(5)
    assert_right(repeat(run, args), args)
    assert not device.captured and run._record.reasons == ["on another stream"]


def test_another_thread_runs_plainly_while_one_replays():
    device, entered, leave = FakeGraphs(), threading.Event(), threading.Event()
    run, args = graphed(device=device), arguments(5)
    repeat(run, args)

    def wait_in_the_middle(buffer, x):
        entered.set()
        assert leave.wait(10)
        buffer[: len(x)].copy_(x)

    results = []
    with mock.patch.object(cuda_graphs, "_fill", wait_in_the_middle):
        thread = threading.Thread(target=lambda: results.append(run(*args)))
        thread.start()
        assert entered.wait(10)
        replays, other = device.replays, arguments(6, seed=3)
        assert_right(run(*other), other)
        assert device.replays == replays
        leave.set()
        thread.join()
    assert_right(results[0], args)


def test_fixed_sizes_have_a_graph_each_up_to_a_limit():
    device = FakeGraphs()
    run = graphed(lambda x, n: [x * n], Signature(("tensor", "number"), (False,)), device=device)
    for length in range(1, 25):
        x = torch.randn(length, 3)
        assert torch.equal(repeat(run, (x, 2))[0], x * 2)
        assert torch.equal(run(x, 2)[0], x * 2)
    assert len(device.captured) == 16
    assert any("more than 16 sizes" in reason for reason in run._record.reasons)


def test_every_layout_has_a_graph_of_its_own():
    device = FakeGraphs()
    run = graphed(device=device)
    for _ in range(3):
        for frames in (torch.randn(5, 2, 3), torch.randn(5, 3, 2).transpose(1, 2)):
            args = [frames, *arguments(5)[1:]]
            assert_right(run(*args), args)
    assert len(device.captured) == 2


def test_sizes_that_never_come_again_cost_nothing():
    device = FakeGraphs()
    run = graphed(lambda x: [x + 1], Signature(("tensor",), (False,)), device=device)
    for length in range(100):
        run(torch.randn(length))
    assert not device.captured


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_inference_mode_and_none_share_a_graph(modes):
    device = FakeGraphs()
    run = graphed(device=device)
    for seed, inference in enumerate((modes[0], modes[0], modes[0], modes[1], modes[1])):
        with torch.inference_mode() if inference else torch.no_grad():
            args = arguments(5, seed)
            assert_right(run(*args), args)
    assert len(device.captured) == 1


# --- Whole models ---------------------------------------------------------------------------------

MERGE = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3, "retain_ratio": 0.2}


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=4, text_layers=3)


@pytest.fixture(scope="module")
def one_trace(model):
    return OneTrace(model.forward)


@contextlib.contextmanager
def fake_graphs(device):
    """Graphs on the CPU, of pieces that nothing compiles, with NaN in every frame that fills a bucket."""
    with (
        mock.patch.object(cuda_graphs, "device_for", lambda _: device),
        mock.patch.object(cuda_graphs, "_fill", padded_with_nan),
        mock.patch.object(cuda_graphs, "_TRIALS", 1),
        mock.patch.object(stages, "lower", lambda graph_module, *_: graph_module.forward),
    ):
        yield


@pytest.mark.parametrize("variant, videos", [("paper", 5), ("released", 3), ("plus", 3)])
def test_videos_through_graphs_are_what_they_are_without(model, one_trace, variant, videos):
    device, options, frames, kept = FakeGraphs(), {**MERGE, "variant": variant}, set(), []
    inputs = [video_inputs(model, 16, seed=seed, scenes=1 + seed % 4) for seed in range(videos)]
    compiled = one_trace.through(partial(earlytom, options={"mode": "reduce-overhead", **options}))
    with fake_graphs(device), torch.no_grad():
        expected = [compressed_forward(model, video, **options).logits for video in inputs]
        for video, logits in zip(inputs * 3, expected * 3, strict=True):
            kept.append((compiled(**video), logits))
            frames.add(tuple(report(model).to_dict()["videos"][0]["frames"]))
    assert len(frames) > videos // 2, "the videos are too alike to show anything"
    for output, logits in kept:
        torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
        assert all(x.isfinite().all() for layer in cache_of(output).layers for x in (layer.keys, layer.values))
        if hasattr(output, "video_outputs"):
            assert output.video_outputs.last_hidden_state.isfinite().all()
    content = report(model).to_dict()
    parts = [graph["part"] for graph in content["cuda_graphs"] if graph["used"]]
    assert sum("frames" in part for part in parts) >= 3 and len(parts) == len(device.captured) < device.replays
    assert any("language_model" in part for part in parts) == (variant != "released")
    assert content["recompiles"] == 0 and f"CUDA graphs      {len(parts)} of" in str(report(model))


def test_a_budget_of_patches_lets_layers_that_reuse_be_replayed(model, one_trace):
    """Without one their sizes depend on the video, and the report says what would help."""
    options = {"variant": "plus", "retain_ratio": 0.2, "full_layers": (3,), "encode_ratio": 0.5}
    inputs = [video_inputs(model, 6, seed=seed, changing=0.3) for seed in range(3)]
    device = FakeGraphs()
    compiled = one_trace.through(partial(earlytom, options={"mode": "reduce-overhead", **options}))
    with fake_graphs(device), torch.no_grad():
        for video in inputs * 3:
            expected = compressed_forward(model, video, **options).logits
            torch.testing.assert_close(compiled(**video).logits, expected, atol=1e-4, rtol=1e-4)
    parts = [graph["part"] for graph in report(model).to_dict()["cuda_graphs"] if graph["used"]]
    assert any("encoder.layers.0" in part for part in parts), parts
    del options["encode_ratio"]
    compiled = one_trace.through(partial(earlytom, options={"mode": "reduce-overhead", **options}))
    with fake_graphs(FakeGraphs()), torch.no_grad():
        compiled(**inputs[0])
    assert any("encode_ratio" in reason for reason in report(model).to_dict()["reasons"])


@pytest.mark.parametrize("encode_ratio", [None, pytest.param(0.5, marks=pytest.mark.long)])
def test_graphs_of_reused_patches_keep_a_length_each(model, encode_ratio):
    """In place, where plans differ from video to video: layers in full are replayed in any case, others with a budget
    only."""
    options = {"variant": "plus", "retain_ratio": 0.2, "full_layers": (0, 3)}
    options |= {} if encode_ratio is None else {"encode_ratio": encode_ratio}
    calls = [video_inputs(model, 5 + n % 2, seed=n, changing=0.1 + 0.2 * n) for n in range(4)]
    expected, device, got = [compressed_generate(model, inputs, 4, **options) for inputs in calls], FakeGraphs(), []
    with fake_graphs(device):
        earlytom_compile.compile(model, mode="reduce-overhead", compile_llm=False, **options)
        for inputs in calls * 3:
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
            got.append(output[:, inputs["input_ids"].shape[1] :])
        content = report(model).to_dict()
        earlytom_compile.restore(model)
    assert all(torch.equal(tokens, wanted) for tokens, wanted in zip(got, expected * 3, strict=True))
    parts = " ".join(graph["part"] for graph in content["cuda_graphs"] if graph["used"])
    assert device.replays > 0 and "layers.3" in parts
    assert ("layers.1" in parts) == (encode_ratio is not None)
    assert any("encode_ratio" in reason for reason in content["reasons"]) == (encode_ratio is None)


def test_generate_replays_the_encoder_and_the_prompt(model):
    device = FakeGraphs()
    inputs = video_inputs(model, 8)
    with fake_graphs(device):
        earlytom_compile.compile(model, mode="reduce-overhead", **MERGE)
        outputs = [model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0) for _ in range(3)]
        parts = " ".join(graph["part"] for graph in report(model).to_dict()["cuda_graphs"])
        earlytom_compile.restore(model)
    assert "vision_tower" in parts and "rotary_emb" in parts
    expected = compressed_generate(model, inputs, 4, **MERGE)
    for output in outputs:
        assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected)


def test_a_static_cache_is_written_to_and_not_captured(model):
    inputs = video_inputs(model, 8)
    with fake_graphs(FakeGraphs()):
        earlytom_compile.compile(model, mode="reduce-overhead", **MERGE)
        choices = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        outputs = [model.generate(**inputs, disable_compile=True, **choices) for _ in range(3)]
        reasons = " ".join(report(model).to_dict()["reasons"])
        earlytom_compile.restore(model)
    assert "layers.0.input_layernorm and 2 more: it writes to its inputs" in reasons
    expected = compressed_generate(model, inputs, 4, **MERGE)
    for output in outputs:
        assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected)


def lowered(mode, device):
    """Three layers, and their record after a few calls."""
    record, layers = GraphRecord("", False), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def backend(graph_module, example_inputs):
        return stages.lower_stages(graph_module, example_inputs, record, stages.inductor_options(mode))

    with fake_graphs(device), torch.no_grad():
        repeat(torch.compile(layers, backend=backend), [torch.randn(2, 4)])
    return record


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"])
def test_graphs_are_made_where_the_mode_asks_for_them(mode):
    device = FakeGraphs()
    record = lowered(mode, device)
    assert len(record.cuda_graphs) == len(device.captured) == (mode in ("reduce-overhead", "max-autotune"))


def test_where_there_are_none_the_record_says_so():
    assert lowered("reduce-overhead", None).reasons == ["no CUDA graphs on the device cpu"]
    assert cuda_graphs.device_for(torch.device("cpu")) is None


def test_one_graph_of_everything_has_none(model, one_trace):
    options = {"mode": "reduce-overhead", "lowering": "eager", **MERGE}
    with torch.no_grad():
        one_trace.through(partial(earlytom, options=options))(**video_inputs(model, 16))
    assert any('need lowering="staged"' in reason for reason in report(model).to_dict()["reasons"])


needs_gpu = pytest.mark.gpu(only=True)


@needs_gpu
def test_a_captured_run_on_a_gpu():
    run, kept = graphed(device=cuda_graphs.CudaDevice(torch.device("cuda", 0))), []
    weight = torch.randn(3, device="cuda")
    with mock.patch.object(GraphedRun, "_is_faster", lambda *_: True):
        for seed in range(100):
            frames, _, scale, count = arguments(1 + seed % 16, seed)
            args = [frames.cuda(), weight, scale.cuda(), count]
            kept.append((run(*args), frames_times_weight(*args)))
            if seed == 50:
                weight = torch.randn(3, device="cuda")
            elif seed == 80:
                weight.mul_(2)
    assert len(run._graphs) == 8
    for results, expected in kept:
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)


@needs_gpu
def test_a_capture_that_fails_leaves_the_gpu_usable():
    def waits(frames, weight, scale, count):
        assert frames.sum().item() is not None
        return frames_times_weight(frames, weight, scale, count)

    run = graphed(waits, device=cuda_graphs.CudaDevice(torch.device("cuda", 0)))
    args, stream = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments(5)], torch.cuda.current_stream()
    assert_right(run(*args), args)
    with pytest.warns(EarlyTomFallbackWarning, match="no CUDA graph of layers"):
        assert_right(run(*args), args)
    assert_right(run(*args), args)
    assert torch.cuda.current_stream() == stream


@needs_gpu
@pytest.mark.parametrize("spelling", ["torch.compile", "earlytom_compile.compile"])
def test_graphs_on_a_gpu_give_the_logits_of_the_cpu(spelling):
    model = tiny_llava_onevision(vision_layers=5, text_layers=3)
    videos = [video_inputs(model, 20, seed=seed, scenes=1 + seed % 4) for seed in range(8)]
    with torch.no_grad():
        expected = [compressed_forward(model, inputs, **MERGE).logits for inputs in videos]
        options = {"mode": "reduce-overhead", **MERGE}
        if spelling == "torch.compile":
            compiled = torch.compile(model.cuda(), backend="earlytom", options=options, dynamic=False)
        else:
            compiled = earlytom_compile.compile(model.cuda(), **options)
        for _ in range(2):
            actual = [compiled(**{name: x.cuda() for name, x in inputs.items()}).logits for inputs in videos]
    for logits, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(logits.cpu(), wanted, atol=1e-3, rtol=1e-3)
    assert report(model).to_dict()["cuda_graphs"]
