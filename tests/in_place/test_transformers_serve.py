"""examples/transformers_serve.py answers requests for videos: the server of ``transformers serve``, compressing."""

import json
import re
import runpy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from effort import cases
from generating import share_vision_paths
from tiny_qwen_checkpoint import write_qwen_checkpoint
from transformers import AutoProcessor

import earlytom_compile
from earlytom_compile import report
from earlytom_compile.cli.demo import write_demo_video
from earlytom_compile.integrations.preprocess import VideoTextProcessor
from earlytom_compile.toyworld.model import VIDEO_TOKENS, WEIGHTS

SERVING = "the server of transformers needs pip install 'transformers[serving]'"
openai = pytest.importorskip("openai", reason=SERVING)
uvicorn = pytest.importorskip("uvicorn", reason=SERVING)
pytest.importorskip("fastapi", reason=SERVING)
pytest.importorskip("transformers.cli.serving.systemone", reason="the example is for transformers 5.20 or newer")

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_serve.py"
MODEL = str(WEIGHTS)
FRAMES = {"chat_template_kwargs": {"num_frames": 8}}
DRAWN = {"min_new_tokens": 40, "max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "top_k": 0}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A file and what is asked about it, with the true answers."""
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    return path, write_demo_video(path)


@pytest.fixture
def checkpoint():
    return MODEL


@pytest.fixture
def options():
    """Of the example's call of ``compile``, which a test may change before it asks for the client."""
    return {}


@pytest.fixture
def served():
    """The models that the example compiled."""
    return []


@pytest.fixture
def client(checkpoint, one_trace, monkeypatch, served, options):
    """Of a server on a free port of this machine, which runs the example's ``main`` as its last line does."""
    share_vision_paths(one_trace, monkeypatch)
    in_place, servers = earlytom_compile.compile, []

    def noted(model, **given):
        assert given == {"retain_ratio": 0.1}
        served.append(in_place(model, **{**given, "lowering": "eager", **options}))  # Inductor has tests of its own
        return model

    def in_thread(app, **where):
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **where))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))

    monkeypatch.setattr(earlytom_compile, "compile", noted)
    monkeypatch.setattr(uvicorn, "run", in_thread)
    runpy.run_path(str(EXAMPLE))["main"](str(checkpoint), host="127.0.0.1", port=0)
    ((server, thread),) = servers
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def ask(client, question, *, video=None, model=MODEL, **more):
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": str(video)}})
    messages = [{"role": "user", "content": content}]
    greedy = {"temperature": 0, "max_tokens": 8, "extra_body": FRAMES}
    return client.chat.completions.create(model=str(model), messages=messages, **{**greedy, **more})


def own_inputs(question, video, processor):
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": question}]
    asked = {"num_frames": 8, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template([{"role": "user", "content": content}], return_tensors="pt", **asked)


def test_questions_about_a_file(client, served, film):
    path, questions = film
    (model,) = served
    processor = VideoTextProcessor.from_pretrained(MODEL)
    for question in questions:
        inputs = own_inputs(question.text, path, processor)
        length = inputs["input_ids"].shape[1]
        answer = ask(client, question.text, video=path)
        told = report(model).to_dict()
        assert told["last_call"] == "compressed"
        assert told["prompt"] == [length, length - VIDEO_TOKENS + 13], "of 128 tokens a tenth, and the newline"
        with torch.no_grad():
            own = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
        text = processor.decode(own, skip_special_tokens=True)
        assert answer.choices[0].message.content == text and text.strip() == question.answer
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, len(own))
        parts = list(ask(client, question.text, video=path, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text


def test_two_clients_at_once_and_one_without_a_video(client, served, film):
    path, questions = film
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda each: ask(client, each.text, video=path), questions * 2))
    assert [each.choices[0].message.content.strip() for each in answers] == [each.answer for each in questions * 2]
    assert report(served[0]).last_call == "compressed"
    ask(client, questions[0].text, extra_body={})
    assert report(served[0]).last_call != "compressed"


@pytest.mark.parametrize(
    "url, told",
    cases(("corrupt.mp4", "corrupt.mp4"), among=[("missing.mp4", "no video file at"), ("corrupt.mp4", "corrupt.mp4")]),
)
def test_a_video_that_cannot_be_read(url, told, client, film, tmp_path):
    path, questions = film
    (tmp_path / "corrupt.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 8])
    with pytest.raises(openai.BadRequestError, match=re.escape(told)):
        ask(client, questions[0].text, video=tmp_path / url)
    assert ask(client, questions[0].text, video=path).choices[0].message.content.strip() == questions[0].answer


def test_more_frames_than_the_file_has(client, film):
    path, questions = film
    with pytest.raises(openai.BadRequestError, match="has 64 frame.s., fewer than the 65 asked for"):
        ask(client, questions[0].text, video=path, extra_body={"chat_template_kwargs": {"num_frames": 65}})


class TestNothingIsLost:
    @pytest.fixture
    def options(self):
        return {"variant": "paper", "retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0, "reuse": False}

    def test_where_everything_is_kept(self, client, served, film):
        path, questions = film
        (model,) = served

        def drawn():
            body = {**FRAMES, "generation_config": json.dumps(DRAWN)}
            asked = {"extra_body": body, "seed": 0, "temperature": openai.omit, "max_tokens": openai.omit}
            return ask(client, questions[0].text, video=path, **asked).choices[0].message.content

        kept = drawn()
        assert report(model).last_call == "compressed"
        earlytom_compile.restore(model)
        assert drawn() == kept and len(set(kept.split())) > 10
        assert report(model).last_call != "compressed"


class TestQwen:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        pytest.importorskip("torchvision", reason="Qwen's processors need torchvision")
        torchcodec = pytest.importorskip("torchcodec", reason="transformers reads files with torchcodec only")
        if getattr(torchcodec, "ffmpeg_major_version", True) is None:
            pytest.skip("torchcodec found no FFmpeg to read files with")
        return write_qwen_checkpoint(tmp_path / "qwen", "cpu-tiny-qwen2.5")

    def test_a_video_without_sound(self, client, checkpoint, served, film):
        (model,) = served
        answer = ask(client, "what happens ?", video=film[0], model=checkpoint)
        told = report(model).to_dict()
        assert told["last_call"] == "compressed" and told["prompt"][0] == answer.usage.prompt_tokens
        with torch.no_grad():
            inputs = own_inputs("what happens ?", film[0], AutoProcessor.from_pretrained(checkpoint))
            own = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        placeholders = int((inputs["input_ids"] == model.config.video_token_id).sum())
        assert told["prompt"][0] - told["prompt"][1] == placeholders - round(placeholders / 10)
        assert answer.usage.completion_tokens == len(own) == 8
        words = AutoProcessor.from_pretrained(checkpoint).decode(own, skip_special_tokens=True)
        assert answer.choices[0].message.content == words.lstrip()  # by transformers' template for Qwen's answers
