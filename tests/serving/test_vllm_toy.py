"""vLLM and transformers answer the same: the trained toy model, the same frames, prompts and options."""

import numpy as np
import pytest
import torch
from engine_process import Engine, EngineFailed

import earlytom_compile

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm")

from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld.answers import prompt_ids
from earlytom_compile.toyworld.evaluate import load_questions

VIDEOS = 66
LEFT_OF_8 = {0.1: 13, 0.25: 32}  # of 8 x 16 tokens


@pytest.fixture(scope="module")
def questions():
    """(frames uint8 [8, 96, 96, 3], question) of 200 and more."""
    loaded = load_questions("test", 0, VIDEOS)
    pairs = [(f.numpy(), q) for f, asked in zip(loaded.frames, loaded.asked, strict=True) for q in asked]
    assert len(pairs) >= 200
    return pairs


def request(frames, question, **more):
    return {"prompt_token_ids": prompt_ids(question, 1), "multi_modal_data": {"video": frames}, **more}


def of_transformers(toy, pairs, options, tokens=2):
    """Greedy tokens by the same checkpoint in transformers, compiled in place; None for ``options`` leaves it plain."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(toy, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(toy)
    if options is not None:
        earlytom_compile.compile(model, strict=True, lowering="eager", **options)
    said = []
    for frames, question in pairs:
        prompt = f"<|im_start|> user <video> {question.text} <|im_end|> <|im_start|> assistant"
        inputs = processor(text=[prompt], videos=[torch.from_numpy(frames)], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        said.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return said


def words(answers):
    return [answer.words for answer in answers]


@pytest.fixture(scope="module")
def compressing(toy):
    """A server's engine under retain_ratio=0.1, several videos and images allowed."""
    with Engine(
        model=str(toy),
        mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}},
        limit_mm_per_prompt={"video": 2, "image": 1},
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(toy):
    with Engine(model=str(toy), limit_mm_per_prompt={"video": 2, "image": 1}) as engine:
        yield engine


class TestAnswers:
    @pytest.mark.parametrize("options", [{"retain_ratio": 0.1}, {"retain_ratio": 0.25, "variant": "paper"}], ids=str)
    def test_are_those_of_transformers(self, toy, compressing, questions, options):
        if options == {"retain_ratio": 0.1}:
            answers = compressing.ask([request(*pair) for pair in questions], tokens=2)
        else:
            with Engine(model=str(toy), mm_processor_kwargs={"earlytom": options}) as engine:
                answers = engine.ask([request(*pair) for pair in questions], tokens=2)
        assert words(answers) == of_transformers(toy, questions, options)
        kept = LEFT_OF_8[options["retain_ratio"]] + 1
        assert [len(answer.prompt) for answer in answers] == [len(prompt_ids(q, kept)) for _, q in questions]

    def test_with_all_tokens_are_those_without_the_plugin(self, toy, plain, questions):
        asked = [request(*pair) for pair in questions]
        whole = {"retain_ratio": 1.0, "variant": "paper", "merge_layers": []}
        with Engine(model=str(toy), mm_processor_kwargs={"earlytom": whole}) as all:
            answers = all.ask(asked, tokens=2)
        without = plain.ask(asked, tokens=2)
        assert words(answers) == words(without)
        assert [answer.prompt for answer in answers] == [answer.prompt for answer in without]

    def test_say_what_the_video_shows(self, compressing, questions):
        """No comparison of two that are both wrong."""
        from earlytom_compile.toyworld.batches import IDS

        answers = compressing.ask([request(*pair) for pair in questions])
        right = [answer.words[0] == IDS[q.answer] for answer, (_, q) in zip(answers, questions, strict=True)]
        assert np.mean(right) > 0.7


class TestOff:
    def test_class_is_that_of_vllm(self, plain):
        assert plain.look("class") == [
            "vllm.model_executor.models.llava_onevision.LlavaOnevisionForConditionalGeneration"
        ]

    def test_a_request_that_asks_for_it_is_refused(self, plain, questions):
        with pytest.raises(EngineFailed, match=r"server was started without.*--mm-processor-kwargs"):
            plain.ask([request(*questions[0], mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}})])
        assert len(plain.ask([request(*questions[0])])) == 1

    def test_answers_are_those_of_transformers(self, toy, plain, questions):
        some = questions[:40]
        assert words(plain.ask([request(*pair) for pair in some], tokens=2)) == of_transformers(toy, some, None)


class TestRequests:
    def test_may_choose_another_ratio(self, toy, compressing, questions):
        some = questions[:20]
        options = {"earlytom": {"retain_ratio": 0.25}}
        answers = compressing.ask([request(*pair, mm_processor_kwargs=options) for pair in some], tokens=2)
        assert words(answers) == of_transformers(toy, some, {"retain_ratio": 0.25})
        assert len(answers[0].prompt) == len(prompt_ids(some[0][1], LEFT_OF_8[0.25] + 1))

    def test_may_leave_a_video_uncompressed(self, compressing, plain, questions):
        some = questions[:20]
        off = [request(*pair, mm_processor_kwargs={"earlytom": False}) for pair in some]
        answers, without = compressing.ask(off, tokens=2), plain.ask([request(*pair) for pair in some], tokens=2)
        assert words(answers) == words(without)
        assert [answer.prompt for answer in answers] == [answer.prompt for answer in without]

    def test_of_one_batch_may_differ(self, compressing, questions):
        """Each is answered as alone: other options and numbers of frames beside it change nothing."""
        chosen = [{}, {"retain_ratio": 0.25}, False, {"retain_ratio": 0.1}, {"retain_ratio": 0.5}]
        lengths = [8, 5, 3, 2, 1]
        asked = [
            request(frames[:length], question, mm_processor_kwargs={"earlytom": options})
            for (frames, question), options, length in zip(questions, chosen, lengths, strict=False)
        ]
        together = compressing.ask(asked, tokens=2)
        alone = [compressing.ask([each], tokens=2)[0] for each in asked]
        assert words(together) == words(alone)
        assert [answer.prompt for answer in together] == [answer.prompt for answer in alone]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"variant": "released"}, "variant='released' under vLLM"),
            ({"inner_layer": 1}, "inner_layer=1 under vLLM"),
            ({"method": "fastv"}, "method='fastv' under vLLM"),
            ({"method": "visionzip"}, "method='visionzip' in a request"),
            ({"retain": 0.1}, "did you mean 'retain_ratio'"),
            ({"retain_ratio": 0}, r"retain_ratio=0: must be in \(0, 1\]"),
            ([0.1], "must be a mapping"),
        ],
    )
    def test_that_cannot_be_compressed_fail_alone(self, compressing, questions, options, reason):
        with pytest.raises(EngineFailed, match=reason):
            compressing.ask([request(*questions[0], mm_processor_kwargs={"earlytom": options})])
        assert len(compressing.ask([request(*questions[0])])) == 1

    def test_with_two_videos(self, toy, compressing, questions):
        """Each has K tokens and a newline of its own."""
        (first, question), (second, _) = questions[0], questions[7]
        ids = prompt_ids(question, 1)
        place = ids.index(4)
        both = [*ids[: place + 1], *ids[place:]]
        (answer,) = compressing.ask([{"prompt_token_ids": both, "multi_modal_data": {"video": [first, second[:5]]}}], 2)
        five = round(0.1 * 5 * 16)
        assert answer.prompt.count(4) == 13 + 1 + five + 1
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(toy, dtype=torch.float32).eval()
        earlytom_compile.compile(model, retain_ratio=0.1, strict=True, lowering="eager")
        processor = AutoProcessor.from_pretrained(toy).video_processor
        videos = [
            processor([torch.from_numpy(v)], return_tensors="pt").pixel_values_videos[0] for v in (first, second[:5])
        ]
        out = model.generate(
            input_ids=torch.tensor([_with_all_places(both, (8, 5))]),
            pixel_values_videos=videos,
            max_new_tokens=2,
            do_sample=False,
        )
        assert out[0, -len(answer.words) :].tolist() == answer.words

    def test_with_an_image_beside_the_video(self, compressing, plain, questions):
        """The image goes the same way and has the same tokens as without the plugin."""
        frames, question = questions[0]
        ids = prompt_ids(question, 1)
        place = ids.index(4)
        mixed = [*ids[:place], 3, *ids[place:]]
        data = {"image": np.ascontiguousarray(questions[9][0][0]), "video": frames}
        from PIL import Image

        data["image"] = Image.fromarray(data["image"])
        asked = {"prompt_token_ids": mixed, "multi_modal_data": data}
        (answer,), (without,) = compressing.ask([asked]), plain.ask([asked])
        assert answer.prompt.count(3) == without.prompt.count(3) > 1
        assert (answer.prompt.count(4), without.prompt.count(4)) == (14, 129)
        whole = {**asked, "mm_processor_kwargs": {"earlytom": False}}
        assert words(compressing.ask([whole])) == words([without])


def _with_all_places(ids, frames):
    counts, out = iter(frames), []
    for token in ids:
        out += [token] * (next(counts) * 16 + 1) if token == 4 else [token]
    return out


class TestEngine:
    """What vLLM does with a prompt on the way changes no answer."""

    def test_compiles_once_for_all_videos(self, compressing, questions):
        compressing.ask([request(*pair) for pair in questions[:3]])
        graphs = compressing.look("graphs")
        more = [request(frames[:length], q) for (frames, q), length in zip(questions[30:], range(2, 9), strict=False)]
        compressing.ask(more)
        assert compressing.look("graphs") == graphs

    def test_prefix_caching_takes_only_the_same_video_and_options(self, compressing, questions):
        frames, question = questions[11]
        asked = request(frames, question)
        first, again = compressing.ask([asked])[0], compressing.ask([asked])[0]
        assert first.words == again.words
        other = request(frames, question, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.11}})
        assert compressing.ask([other])[0].cached <= prompt_ids(question, 1).index(4)
        moved = request(np.roll(frames, 9, axis=2), question)
        assert compressing.ask([moved])[0].cached <= prompt_ids(question, 1).index(4)

    def test_cached_prefixes_answer_alike(self, toy, questions):
        some = [(questions[0][0], q) for _, q in questions[:12]]
        arguments = {"model": str(toy), "mm_processor_kwargs": {"earlytom": {"retain_ratio": 0.5}}}
        with Engine(**arguments, enable_prefix_caching=True, block_size=32) as engine:
            answers = [engine.ask([request(*pair)], tokens=2)[0] for pair in some]
        assert max(answer.cached for answer in answers) > 32
        assert words(answers) == of_transformers(toy, some, {"retain_ratio": 0.5})

    def test_chunked_prefill(self, toy, questions):
        """A video's placeholders cut between chunks."""
        some = questions[:24]
        with Engine(
            model=str(toy),
            mm_processor_kwargs={"earlytom": {"retain_ratio": 0.5}},
            max_num_batched_tokens=80,
            max_model_len=256,
            max_num_seqs=4,
            enable_chunked_prefill=True,
        ) as engine:
            answers = engine.ask([request(*pair) for pair in some], tokens=2)
        assert words(answers) == of_transformers(toy, some, {"retain_ratio": 0.5})

    def test_encodes_as_many_in_a_step_as_without_compression(self, toy, questions):
        """8 videos of 14 tokens fit into a budget of 300 tokens; at what they would have had, 129, three begin."""
        videos = [request(np.roll(questions[0][0], shift, axis=2), questions[0][1]) for shift in range(8)]
        with Engine(
            model=str(toy),
            mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}},
            limit_mm_per_prompt={"video": 1, "image": 0},
            max_num_batched_tokens=300,
        ) as engine:
            engine.look("count")
            engine.ask(videos)
            (steps,) = engine.look("counted")
        assert sum(steps) == 8 and max(steps) == 3

    @pytest.mark.long
    def test_compiled(self, toy, questions):
        """Inductor's code in the vision path and vLLM's own compilation of the language model."""
        some = questions[:24]
        options = {"retain_ratio": 0.1}
        with Engine(model=str(toy), mm_processor_kwargs={"earlytom": options}, enforce_eager=False) as engine:
            answers = engine.ask([request(*pair) for pair in some], tokens=2)
            (graphs,) = engine.look("graphs")
        assert graphs == ["videos of 2 and more frames, 96x96, float32 on cpu"]
        assert words(answers) == of_transformers(toy, some, options)

    @pytest.mark.long
    def test_tensor_parallel(self, toy, questions):
        """Two ranks, each of which encodes every other video."""
        some = questions[:24]
        with Engine(
            {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            model=str(toy),
            mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}},
            tensor_parallel_size=2,
        ) as engine:
            answers = engine.ask([request(*pair) for pair in some], tokens=2)
        assert words(answers) == of_transformers(toy, some, {"retain_ratio": 0.1})

    def test_that_cannot_compress_does_not_start(self, toy):
        with pytest.raises(EngineFailed, match="merge_layers=.*layer 40 does not exist"):
            Engine(model=str(toy), mm_processor_kwargs={"earlytom": {"variant": "paper", "merge_layers": [40]}})

    def test_two_ways_of_pruning_do_not_start(self, toy):
        with pytest.raises(EngineFailed, match="--video-pruning-rate 0.5 together with .* one of them"):
            Engine(model=str(toy), mm_processor_kwargs={"earlytom": {}}, video_pruning_rate=0.5)
