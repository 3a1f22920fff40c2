"""``vllm serve`` as docs/serving.md says, asked over HTTP by OpenAI's client with real files of videos."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from films import turn, write_film

import earlytom_compile

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm")

import openai
from PIL import Image
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from earlytom_compile.benchmarks.vllm_server import VllmServer
from earlytom_compile.toyworld.answers import prompt_ids
from earlytom_compile.toyworld.batches import IDS
from earlytom_compile.toyworld.questions import ask
from earlytom_compile.toyworld.world import rng_of, sample_video, write_mp4

FRAMES, A_FRAME = 8, 16  # of a video at most, and tokens of each
COMPRESS = ("--mm-processor-kwargs", '{"earlytom": {"retain_ratio": 0.1}}')
TRUST = "--trust-request-mm-kwargs"
QUARTER_TURN = (0, 1, -1, 0)


def kept(frames, ratio=0.1):
    return round(ratio * frames * A_FRAME)


K = kept(FRAMES)


class Client:
    """One of OpenAI's, and what is asked of a server in all tests."""

    def __init__(self, server, model):
        self.server, self.model = server, str(model)
        self.api = f"{server.url}/v1"

    def ask(self, parts, question, **extra):
        """(words, tokens of the prompt)."""
        parts = parts if isinstance(parts, list) else [parts]
        api = openai.OpenAI(base_url=self.api, api_key="none", max_retries=0, timeout=120)  # vLLM closes after a 500
        said = api.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            max_tokens=2,
            temperature=0,
            extra_body=extra,
        )
        return said.choices[0].message.content.split(), said.usage.prompt_tokens


def as_data(path):
    return _video("data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode())


def as_file(path):
    return _video(f"file://{path}")


def _video(url):
    return {"type": "video_url", "video_url": {"url": url}}


def as_image(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def decoded(path, frames=FRAMES):
    """What vLLM makes of the file: uint8 [F, H, W, 3]."""
    loaded = VideoMediaIO(ImageMediaIO(), num_frames=frames).load_bytes(path.read_bytes())
    return getattr(loaded, "media", loaded)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def asked(folder):
    """(file, question) about videos of the toy world."""
    pairs = []
    for seed in range(10):
        video, path = sample_video("test", seed), folder / f"toy{seed}.mp4"
        write_mp4(video, path)
        pairs += [(path, question) for question in ask(video, rng_of("test", seed, 1)).values()]
    assert len(pairs) >= 30
    return pairs


@pytest.fixture(scope="module")
def serve(toy, folder, tmp_path_factory):
    """Flags -> a client of a server that was started with them."""
    logs = tmp_path_factory.mktemp("logs")

    def start(*flags):
        return VllmServer(
            toy,
            *("--dtype", "float32", "--max-model-len", "1024", "--limit-mm-per-prompt", '{"video": 2, "image": 1}'),
            *("--media-io-kwargs", f'{{"video": {{"num_frames": {FRAMES}}}}}'),
            *("--allowed-local-media-path", str(folder)),
            *flags,
            log=logs / f"{len(list(logs.iterdir()))}.log",
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )

    return start


@pytest.fixture(scope="module")
def compressing(serve, toy):
    with serve(*COMPRESS, TRUST, "--enforce-eager") as server:
        yield Client(server, toy)


@pytest.fixture(scope="module")
def transformers_say(toy):
    """(frames of each video, question) of several -> words, by transformers with the same checkpoint and options."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(toy, dtype=torch.float32).eval()
    earlytom_compile.compile(model, retain_ratio=0.1, strict=True, lowering="eager")
    processor = AutoProcessor.from_pretrained(toy)

    def say(videos, question):
        pixels = [processor.video_processor([torch.from_numpy(v)], return_tensors="pt") for v in videos]
        ids, video = [], IDS["<video>"]
        for token in prompt_ids(question, 1):
            ids += [t for v in videos for t in [video] * (len(v) * A_FRAME + 1)] if token == video else [token]
        out = model.generate(
            input_ids=torch.tensor([ids]),
            pixel_values_videos=[each.pixel_values_videos[0] for each in pixels],
            max_new_tokens=2,
            do_sample=False,
        )
        return processor.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).split()

    return say


class TestVideos:
    def test_are_answered_as_by_transformers(self, compressing, transformers_say, asked):
        right = 0
        for number, (path, question) in enumerate(asked):
            words, tokens = compressing.ask((as_data, as_file)[number % 2](path), question.text)
            assert words == transformers_say([decoded(path)], question), (path, question)
            assert tokens == len(prompt_ids(question, K + 1))
            right += words[0] == question.answer
        assert right > 0.7 * len(asked)  # no comparison of two that are both wrong

    @pytest.mark.parametrize("frames", [2, 3, 5, 9])
    def test_that_are_short_have_the_frames_they_have(self, compressing, transformers_say, asked, folder, frames):
        path, question = write_film(folder / f"{frames}.mp4", frames), asked[0][1]
        words, tokens = compressing.ask(as_data(path), question.text)
        assert words == transformers_say([decoded(path)], question)
        assert tokens == len(prompt_ids(question, kept(min(frames, FRAMES)) + 1))

    def test_that_were_turned_are_seen_upright(self, compressing, transformers_say, asked, folder):
        """vLLM's decoder follows the display matrix."""
        path, question = asked[0]
        turned = folder / "turned.mp4"
        turned.write_bytes(path.read_bytes())
        turn(turned, QUARTER_TURN)
        upright = np.rot90(decoded(path), -1, (1, 2))
        assert np.abs(decoded(turned).astype(int) - upright).mean() < 2
        words, _ = compressing.ask(as_data(turned), question.text)
        assert words == transformers_say([decoded(turned)], question)

    def test_two_in_a_request(self, compressing, transformers_say, asked, folder):
        (first, question), short = asked[0], write_film(folder / "beside.mp4", 5)
        words, tokens = compressing.ask([as_data(first), as_file(short)], question.text)
        assert words == transformers_say([decoded(first), decoded(short)], question)
        assert tokens == len(prompt_ids(question, K + 1 + kept(5) + 1))

    def test_beside_an_image(self, compressing, asked):
        """Which keeps the tokens it has alone."""
        path, question = asked[0]
        picture = as_image(decoded(asked[-1][0])[0])
        _, alone = compressing.ask(picture, question.text)
        _, both = compressing.ask([picture, as_data(path)], question.text)
        assert both == alone + K + 1
        whole, _ = compressing.ask([picture, as_data(path)], question.text, mm_processor_kwargs={"earlytom": False})
        assert whole

    def test_of_several_clients_at_once(self, compressing, transformers_say, asked, folder):
        """Videos of 2 to 8 frames, in batches as they come: each is answered as alone."""
        question = asked[0][1]
        paths = [write_film(folder / f"at_once_{frames}.mp4", frames, gop=5) for frames in range(2, 9)]
        jobs = [(path, question) for path in paths] + asked[:9]
        with ThreadPoolExecutor(len(jobs)) as clients:
            answers = list(clients.map(lambda job: compressing.ask(as_data(job[0]), job[1].text), jobs))
        assert [words for words, _ in answers] == [transformers_say([decoded(p)], q) for p, q in jobs]
        assert [n for _, n in answers] == [len(prompt_ids(q, kept(len(decoded(p))) + 1)) for p, q in jobs]


def damaged(path, target):
    """The same container; every picture in it is noise."""
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[begin:end] = (byte ^ 0x5A for byte in data[begin:end])
    target.write_bytes(data)
    return target


@pytest.fixture(scope="module")
def files(asked, folder):
    good, files = (
        asked[0][0],
        {name: folder / f"{name}.mp4" for name in ("empty", "noise", "cut", "damaged", "one")},
    )
    files["empty"].write_bytes(b"")
    files["noise"].write_bytes(bytes(range(256)) * 20)
    files["cut"].write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    damaged(write_film(folder / "whole.mp4", 16), files["damaged"])
    write_film(files["one"], 1)
    return files


class TestVideosThatCannotBeRead:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("empty", "Could not open video stream"),
            ("noise", "Could not open video stream"),
            ("cut", "Could not open video stream"),
            ("damaged", "no frame of it"),  # ours: in a worker it would be the end of the server
            ("one", "single frame"),  # OpenCV reads none
        ],
    )
    @pytest.mark.parametrize("how", [as_data, as_file])
    def test_fail_alone(self, compressing, asked, files, name, reason, how):
        with pytest.raises(openai.BadRequestError, match=reason):
            compressing.ask(how(files[name]), asked[0][1].text)
        still_answers(compressing, asked)

    def test_beside_one_that_can(self, compressing, asked, files):
        with pytest.raises(openai.BadRequestError, match="video 1 of the request"):
            compressing.ask([as_data(asked[0][0]), as_data(files["damaged"])], asked[0][1].text)
        still_answers(compressing, asked)

    def test_that_are_not_there(self, compressing, asked, folder):
        with pytest.raises(openai.APIStatusError):
            compressing.ask(as_file(folder / "nowhere.mp4"), asked[0][1].text)
        still_answers(compressing, asked)

    def test_while_another_client_is_answered(self, compressing, asked, files):
        def one(number):
            if number % 2:
                return compressing.ask(as_data(asked[number][0]), asked[number][1].text)
            with pytest.raises(openai.BadRequestError):
                compressing.ask(as_data(files["damaged"]), asked[0][1].text)
            return None

        with ThreadPoolExecutor(2) as clients:
            answers = list(clients.map(one, range(12)))
        assert all(answers[1::2])


def still_answers(client, asked, tokens=K):
    path, question = asked[1]
    words, length = client.ask(as_data(path), question.text)
    assert words
    assert length == len(prompt_ids(question, tokens + 1))
    assert client.server.alive()


class TestOptionsOfARequest:
    @pytest.mark.parametrize(
        ("options", "tokens"),
        [
            ({"retain_ratio": 0.25}, kept(FRAMES, 0.25)),
            (False, FRAMES * A_FRAME),
            ({}, kept(FRAMES)),
            (True, kept(FRAMES)),
        ],
    )
    def test_decide_how_long_its_prompt_is(self, compressing, asked, options, tokens):
        path, question = asked[0]
        _, length = compressing.ask(as_data(path), question.text, mm_processor_kwargs={"earlytom": options})
        assert length == len(prompt_ids(question, tokens + 1))

    def test_frames_are_chosen_beside_them(self, compressing, asked):
        path, question = asked[0]
        _, length = compressing.ask(as_data(path), question.text, media_io_kwargs={"video": {"num_frames": 16}})
        assert length == len(prompt_ids(question, kept(16) + 1))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"variant": "released"}, "variant='released' under vLLM"),
            ({"retain": 0.1}, "did you mean 'retain_ratio'"),
            ({"retain_ratio": 7}, r"must be in \(0, 1\]"),
            ({"merge_layers": [1]}, "its server decides that"),
            ({"strict": True}, "Leave strict out"),
            ("yes", "must be a mapping"),
        ],
    )
    def test_that_cannot_be_are_refused(self, compressing, asked, options, reason):
        path, question = asked[0]
        with pytest.raises(openai.BadRequestError, match=reason):
            compressing.ask(as_data(path), question.text, mm_processor_kwargs={"earlytom": options})
        still_answers(compressing, asked)

    @pytest.mark.parametrize("compress", [True, False])
    def test_of_the_processor_cannot_change_the_size_of_frames(self, compressing, asked, compress):
        """The tower takes one size, and its error in a worker would be the end of the server."""
        path, question = asked[0]
        options = {"earlytom": compress, "size": {"height": 48, "width": 48}}
        with pytest.raises(openai.BadRequestError, match="frames of 48x48 pixels.*takes 96x96"):
            compressing.ask(as_data(path), question.text, mm_processor_kwargs=options)
        still_answers(compressing, asked)


class TestOtherServers:
    def test_without_the_option_keeps_all_tokens_and_refuses_to_compress(self, serve, toy, asked):
        path, question = asked[0]
        with serve(TRUST, "--enforce-eager") as server:
            client = Client(server, toy)
            with pytest.raises(openai.BadRequestError, match="server was started without"):
                client.ask(as_data(path), question.text, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}})
            still_answers(client, asked, FRAMES * A_FRAME)

    def test_without_trust_takes_no_options_of_requests(self, serve, toy, asked):
        path, question = asked[0]
        with serve(*COMPRESS, "--enforce-eager") as server:
            client = Client(server, toy)
            with pytest.raises(openai.BadRequestError, match=TRUST):
                client.ask(as_data(path), question.text, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.25}})
            still_answers(client, asked)

    @pytest.mark.long
    def test_that_compiles(self, serve, toy, asked, transformers_say):
        with serve(*COMPRESS) as server:
            client = Client(server, toy)
            for path, question in asked[:12]:
                words, _ = client.ask(as_file(path), question.text)
                assert words == transformers_say([decoded(path)], question)
