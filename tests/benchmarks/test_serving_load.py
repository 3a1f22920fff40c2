"""What ``serving_load`` sends, in which order, and what it makes of the times; servers of which nobody needs vLLM."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from earlytom_compile.benchmarks import serving_load, vllm_server
from earlytom_compile.benchmarks.serving_load import COMPRESSED, FULL, Served, losses, main, rows
from earlytom_compile.benchmarks.serving_workload import QUESTION, write_checkpoint, write_requests
from earlytom_compile.benchmarks.vllm_server import VllmServer, vllm_command
from earlytom_compile.errors import EarlyTomConfigError, EarlyTomError
from earlytom_compile.integrations.video import read_video


class TestRequests:
    def test_have_a_video_of_their_own_each(self, tmp_path):
        first = write_requests(tmp_path / "a.json", videos=tmp_path, first=0, count=2, frames=8)
        second = write_requests(tmp_path / "b.json", videos=tmp_path, first=2, count=3, frames=8)
        assert len({path.read_bytes() for path in [*first, *second]}) == 5
        asked = json.loads((tmp_path / "b.json").read_text())
        assert [each["video"] for each in asked] == [str(path) for path in second]
        assert {turn["value"] for each in asked for turn in each["conversations"]} == {QUESTION, "two"}

    def test_show_scenes_in_which_frames_are_alike(self, tmp_path):
        (path,) = write_requests(tmp_path / "a.json", videos=tmp_path, first=0, count=1, frames=16)
        frames = np.asarray(read_video(path, frames=16).pixels).astype(int)
        change = np.abs(np.diff(frames, axis=0)).reshape(15, -1).mean(1)
        cuts = np.arange(3, 15, 4)
        assert change[cuts].min() > 5 * np.delete(change, cuts).max()

    def test_go_to_a_checkpoint_as_published(self, tmp_path):
        folder = write_checkpoint("cpu-tiny", tmp_path / "model")
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == config.text_config.vocab_size
        assert tokenizer.unk_token_id not in tokenizer(QUESTION).input_ids
        assert config.video_token_id == tokenizer.convert_tokens_to_ids("<video>")
        names = vllm_names(folder / "model.safetensors")
        assert any("vision_tower.vision_model.encoder" in name for name in names)
        assert not any("vision_model.vision_model" in name for name in names)

    def test_of_other_models_need_a_checkpoint(self, tmp_path):
        with pytest.raises(EarlyTomConfigError, match="--model"):
            write_checkpoint("cpu-tiny-qwen3", tmp_path)


def vllm_names(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def served(server, clients, rounds, ttft):
    return Served(server, clients, 10, 100, rounds, ttft)


class TestTable:
    def test_compares_with_the_full_server_under_the_same_load(self):
        results = [
            served(FULL, 1, [10.0, 20.0, 10.0], [1.0]),
            served(COMPRESSED, 1, [5.0, 5.0, 4.0], [0.5]),
        ]
        full, compressed = rows(results)
        assert full[:4] == ("1", "full", "100", "1") and full[5] == "1.00x"
        assert compressed[3:] == ("2", "2 to 2.5", "2.00x", "500 / 500 / 500")
        assert losses(results) == []

    def test_names_every_loss(self):
        results = [
            served(FULL, 1, [10.0], [1.0]),
            served(COMPRESSED, 1, [10.1], [0.5]),  # fewer requests a second
            served(FULL, 8, [10.0], [1.0]),
            served(COMPRESSED, 8, [9.0], [1.1]),  # later
            served(FULL, 32, [10.0], [1.0]),
            served(COMPRESSED, 32, [9.0], [0.9]),
        ]
        assert losses(results) == [1, 8]


class TestRun:
    @pytest.fixture
    def seen(self, monkeypatch):
        """Without servers: who was started with which flags and asked how much."""
        seen = []

        class Server:
            def __init__(self, model, *flags, log):
                seen.append(("start", "--mm-processor-kwargs" in flags, flags))
                self.faster = 2 if "--mm-processor-kwargs" in flags else 1

            def __enter__(self):
                return self

            def __exit__(self, *_):
                seen.append(("stop",))

        def benchmark(server, plan, level):
            seen.append(("ask", level.clients, level.count, level.file.read_text()))
            seconds = level.count / server.faster
            return {"completed": level.count, "duration": seconds, "ttfts": [seconds] * level.count, "errors": []}

        monkeypatch.setattr(serving_load, "VllmServer", Server)
        monkeypatch.setattr(serving_load, "_benchmark", benchmark)
        monkeypatch.setattr(serving_load, "_warm_up", lambda server, plan: 50)
        return seen

    def test_takes_turns_and_asks_both_the_same(self, seen, tmp_path, capsys):
        arguments = ["--shape", "cpu-tiny", "--clients", "1,3", "--requests", "4", "--rounds", "2", "--frames", "4"]
        assert main([*arguments, "--json", str(tmp_path / "a.json"), "--", "--enforce-eager"]) == 0
        starts = [event for event in seen if event[0] == "start"]
        assert [compresses for _, compresses, _ in starts] == [False, True, False, True]
        assert all(flags[flags.index("--limit-mm-per-prompt") :].count("--enforce-eager") for *_, flags in starts)
        asked = [event[1:] for event in seen if event[0] == "ask"]
        assert [(clients, count) for clients, count, _ in asked] == [(1, 4), (3, 6)] * 4
        assert asked[:2] == asked[2:4] == asked[4:6]  # of all servers
        videos = [each["video"] for _, _, text in asked[:2] for each in json.loads(text)]
        assert len(set(videos)) == len(videos)
        assert "compression gains at every load" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "a.json").read_text())["results"]) == 4

    def test_options_that_no_server_takes_start_none(self, seen, capsys):
        assert main(["--options", '{"variant": "released"}']) == 2
        assert "variant='released' under vLLM" in capsys.readouterr().err
        assert not seen


SERVES = """
import http.server, signal, sys
{before}
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


class TestServer:
    @pytest.fixture
    def stands_in(self, monkeypatch, tmp_path):
        def make(program):
            monkeypatch.setattr(vllm_server, "vllm_command", lambda *rest: [sys.executable, "-c", program, *rest])
            return VllmServer("model", log=tmp_path / "log")

        return make

    @pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["polite", "deaf"])
    def test_is_there_for_as_long_as_wanted(self, stands_in, monkeypatch, before):
        monkeypatch.setattr(vllm_server, "STOP_S", 2)
        with stands_in(SERVES.format(before=before)) as server:
            assert server.alive()
        assert not server.alive()

    def test_that_ends_says_why(self, stands_in):
        with (
            pytest.raises(EarlyTomError, match="(?s)ended before it was ready.*no such flag"),
            stands_in("raise SystemExit('no such flag')"),
        ):
            pass

    def test_that_never_comes_is_not_waited_for(self, stands_in, monkeypatch):
        monkeypatch.setattr(vllm_server, "START_S", 1)
        with pytest.raises(EarlyTomError, match="not ready after 1 s"), stands_in("import time; time.sleep(60)"):
            pass

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
    def test_without_vllm_says_so(self):
        with pytest.raises(EarlyTomError, match="vLLM is not installed"):
            vllm_command("serve")
