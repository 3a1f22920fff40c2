"""lmms-eval's models for LLaVA's own code: prompts, pictures and videos as LLaVA takes them, and answers in batches."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import torch
from films import write_film
from tiny_llava import tiny_llava  # skips without LLaVA's code
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

from llava.model.multimodal_encoder import siglip_encoder  # noqa: E402

from earlytom_compile import EarlyTomConfigError, EarlyTomError  # noqa: E402
from earlytom_compile.integrations.lmms_eval.arguments import read_arguments  # noqa: E402
from earlytom_compile.integrations.lmms_eval.llava_code import ARGUMENTS, LlavaSpeaker  # noqa: E402
from earlytom_compile.integrations.lmms_eval.prompts import Film, Picture, Turn  # noqa: E402
from earlytom_compile.integrations.video import read_video  # noqa: E402

TOWER = "tiny/siglip-384-patch14"
FRAMES = 4
WIDTH = 32
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>")
WORDS = "system user assistant You are a helpful assistant . what who ? is in it red blue green , s The video lasts for"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint without its tower, and the tower, which the Hub would have."""
    checkpoint, tower = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("tower")
    options = {"mm_vision_tower": TOWER, "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]]}
    model = tiny_llava(vision_hidden=WIDTH, text_layers=2, **options)
    own = model.model.vision_tower
    model.model.vision_tower = type(own)(TOWER, model.config, delay_load=True)
    model.save_pretrained(checkpoint)
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS.split())))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    more = {"additional_special_tokens": ["<|im_start|>"]}
    PreTrainedTokenizerFast(tokenizer_object=words, **special, **more).save_pretrained(checkpoint)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = siglip_encoder.SigLipVisionConfig(image_size=384, patch_size=14, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full = siglip_encoder.SigLipVisionModel(config)
        for parameter in full.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    full.save_pretrained(tower)
    return checkpoint, tower


@pytest.fixture
def speaker(folders, monkeypatch):
    checkpoint, tower = folders
    kind = siglip_encoder.SigLipVisionModel
    load = kind.from_pretrained

    def from_the_hub(name, **named):
        assert name == TOWER
        return load(tower, **named)

    monkeypatch.setattr(kind, "from_pretrained", from_the_hub)
    # LLaVA's conversations look for the tokenizer of a Llama when they are imported, for most of a minute.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def made(**given):
        given = {"pretrained": str(checkpoint), "device": "cpu", "max_frames_num": FRAMES, **given}
        return LlavaSpeaker(read_arguments(given, own=ARGUMENTS))

    return made


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_film(tmp_path_factory.mktemp("film") / "film.mkv", 50))


def drawn(seed, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def first_scores(speaker, samples):
    """Of the first new token, [R, words], in one call."""
    inputs = speaker.inputs(samples)
    output = speaker.model.generate(
        **inputs, max_new_tokens=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    assert speaker.new_tokens(output.sequences, inputs).shape[1] <= 2
    return output.scores[0]


def test_a_video_and_a_question(speaker, film):
    one = speaker()
    sample = one.prepare([Turn("user", (Film(film), "what is in it ?"))])
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    behind = "\nwhat is in it ?<|im_end|>\n<|im_start|>assistant\n"
    ids = [*one.tokenizer(before)["input_ids"], -200, *one.tokenizer(behind)["input_ids"]]
    assert sample.ids.tolist() == ids and sample.frames == (FRAMES,)
    frames = list(read_video(film, FRAMES).pixels)
    expected = one.model.get_vision_tower().image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(sample.videos[0], torch.as_tensor(expected)) and sample.videos[0].shape == (FRAMES, 3, 384, 384)
    inputs = one.inputs([sample])
    assert inputs["modalities"] == ["video"] and one.tokens_per_frame == 14 * 14
    embeddings = one.model.prepare_inputs_labels_for_multimodal(
        inputs["inputs"], None, inputs["attention_mask"], None, None, inputs["images"], ["video"], image_sizes=None
    )[4]
    assert embeddings.shape[1] == len(ids) - 1 + FRAMES * one.tokens_per_frame + 1


def test_batches_change_no_answer(speaker, film):
    one = speaker()
    turns = [
        [Turn("user", (Film(film), "what is in it ?"))],
        [Turn("user", (Film([drawn(1), drawn(2)]), "who ?"))],
        [Turn("user", (Film(film), Film([drawn(3)]), Picture(drawn(4)), "who is in it ? red , blue ?"))],
        [Turn("user", (Picture(drawn(5)), "who ?"))],
        [
            Turn("user", ("who is ", Picture(drawn(6, (40, 90))), " ?")),
            Turn("assistant", ("red",)),
            Turn("user", ("?",)),
        ],
    ]
    samples = [one.prepare(each) for each in turns]
    alone = torch.cat([first_scores(one, [sample]) for sample in samples])
    torch.testing.assert_close(first_scores(one, samples), alone, atol=1e-4, rtol=1e-4)
    assert torch.pdist(alone).min() > 0.1, "the test must have prompts that differ"
    words = [one.prepare([Turn("user", (text,))]) for text in ("who ?", "what is in it ?")]
    assert [sample.kind for sample in words] == [(False, False)] * 2
    alone = torch.cat([first_scores(one, [sample]) for sample in words])
    torch.testing.assert_close(first_scores(one, words), alone, atol=1e-4, rtol=1e-4)


def test_pictures_alone_are_cut_in_crops_and_several_are_squares(speaker):
    one = speaker()
    alone = one.prepare([Turn("user", (Picture(drawn(1, (90, 40))), "who ?"))])
    several = one.prepare([Turn("user", (Picture(drawn(1, (90, 40))), Picture(drawn(2)), "who ?"))])
    assert alone.others["images"][0].dim() == 4 and alone.others["image_sizes"] == [(90, 40)]
    assert [image.shape for image in several.others["images"]] == [(3, 384, 384)] * 2
    assert several.others["modalities"] == ["image"] * 2
    assert one.model.config.image_aspect_ratio == "anyres_max_9"


def test_the_time_instruction(speaker, film):
    one = speaker(add_time_instruction=True)
    prompt = one._prompt([Turn("user", (Film(film), "who ?"))], [one._clip(Film(film))])
    said = re.search(r"<image>\nThe video lasts for (\S+) seconds, and 4 frames .* located at (\S+)\.Please", prompt)
    assert said is not None and said[1] == "2.00"  # 50 frames, 25 a second
    assert said[2].split(",") == [f"{index / 25:.2f}s" for index in (0, 16, 32, 49)] and "video.\nwho ?" in prompt
    with pytest.raises(EarlyTomConfigError, match="nobody says how long this video is"):
        one.prepare([Turn("user", (Film([drawn(1)]), "who ?"))])


def test_options_of_the_model(speaker):
    one = speaker(mm_spatial_pool_mode="average", mm_newline_position="grid", conv_template="qwen_2_5")
    assert (one.model.config.mm_spatial_pool_mode, one.model.config.mm_newline_position) == ("average", "grid")
    assert one.tokens_per_frame == 13 * 13 and "You are Qwen" in one._prompt([Turn("user", ("who ?",))], [])
    assert one.model.dtype == torch.float32 and speaker(dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given, says",
    [
        ({"conv_template": "qwen"}, "conv_template='qwen': must be one of .*'qwen_1_5'"),
        ({"add_time_instruction": "yes"}, "add_time_instruction='yes': must be True or False"),
    ],
)
def test_bad_options_are_named(speaker, given, says):
    with pytest.raises(EarlyTomConfigError, match=says):
        speaker(**given)


def test_what_cannot_be_asked_is_refused(speaker):
    one = speaker()
    with pytest.raises(EarlyTomConfigError, match="role 'system'"):
        one.prepare([Turn("system", ("be brief",)), Turn("user", ("who ?",))])
    with pytest.raises(EarlyTomConfigError, match="1 <image> for 0 pictures and videos"):
        one.prepare([Turn("user", ("what is <image> ?",))])


def test_a_checkpoint_of_other_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlavaOnevisionForConditionalGeneration"]}))
    with pytest.raises(EarlyTomConfigError, match="known for 'LlavaQwenForCausalLM'.*take --model earlytom"):
        LlavaSpeaker(read_arguments({"pretrained": str(tmp_path)}, own=ARGUMENTS))


@pytest.mark.parametrize("newline", ["one_token", "no_token", "frame", "grid"])
@pytest.mark.parametrize("pool", ["bilinear", "average"])
def test_positions_are_those_of_the_models_own_prompt(speaker, film, newline, pool):
    one = speaker(mm_newline_position=newline, mm_spatial_pool_mode=pool)
    one.model.config.tokenizer_model_max_length = None
    turns = [
        (Film(film), "what is in it ?"),
        (Film(film), Film([drawn(1)]), "who ?"),
        (Picture(drawn(2, (90, 40))), "who ?"),
        (Picture(drawn(3)), Film([drawn(4), drawn(5)]), Picture(drawn(6, (40, 90))), "who ?"),
    ]
    for parts in turns:
        sample = one.prepare([Turn("user", parts)])
        call = one.inputs([sample])
        with torch.no_grad():
            own = one.model.prepare_inputs_labels_for_multimodal(
                call["inputs"], None, None, None, None, call["images"], call["modalities"], call["image_sizes"]
            )[4]
        assert one.positions(sample) == own.shape[1]
    assert one.positions(one.prepare([Turn("user", ("who ?",))])) == len(one.prepare([Turn("user", ("who ?",))]).ids)


@pytest.fixture
def in_lmms_eval(speaker, monkeypatch):
    """(the speaker, a maker of models around it, answers of a model to documents (what is shown, question))."""
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed")
    from lmms_eval.api.instance import Instance

    from earlytom_compile.integrations.lmms_eval import model

    one = speaker()
    monkeypatch.setattr(model, "LlavaSpeaker", lambda arguments: one)

    def made(ratio, size=1, **options):
        return model.EarlyTomLlavaOnevision(
            pretrained="x", batch_size=size, retain_ratio=ratio, lowering="eager", **options
        )

    def answers(lm, documents):
        lm.task_dict = {"drawn": {"test": documents}}
        requests = [
            Instance(
                request_type="generate_until",
                arguments=(question, {"max_new_tokens": 5}, lambda doc: doc[0], place, "drawn", "test"),
                idx=0,
                metadata={"task": "drawn", "doc_id": place, "repeats": 1},
            )
            for place, (_, question) in enumerate(documents)
        ]
        return [answer.text for answer in lm.generate_until(requests)]

    return one, made, answers


def test_the_full_model_is_asked_no_prompt_that_its_code_cuts(in_lmms_eval, film):
    one, made, answers = in_lmms_eval
    documents = [([[drawn(1)]], "who ?"), (film, "what is in it ?")]
    config, whole = one.model.config, one.positions(one.prepare([Turn("user", (Film(film), documents[1][1]))]))
    assert whole > FRAMES * one.tokens_per_frame
    config.tokenizer_model_max_length = whole
    fits = answers(made(None), documents)
    config.tokenizer_model_max_length = whole - 1
    says = rf"document 1: the prompt has {whole} positions with all tokens, .* takes {whole - 1} .*max_frames_num"
    for size in (1, 2):
        with pytest.raises(EarlyTomError, match=says):
            answers(made(None, size), documents)
        assert len(answers(made(0.2, size), documents)) == len(fits) == 2
    # Nothing is compressed in a call without strict: the same holds for it.
    config.add_faster_video = True
    with pytest.raises(EarlyTomError, match=says):
        answers(made(0.2, strict=False), documents)


def test_what_is_too_long_when_it_is_compressed_is_an_error_too(in_lmms_eval, film):
    one, made, answers = in_lmms_eval
    kept, text = round(0.2 * FRAMES * one.tokens_per_frame), 2 * len(one.prepare([Turn("user", ("who ?",))]).ids)
    one.model.config.tokenizer_model_max_length = kept
    with pytest.raises(EarlyTomError, match=rf"document 0: the prompt has at least {kept} positions when compressed"):
        answers(made(0.2), [(film, "who ?")])
    one.model.config.tokenizer_model_max_length = kept + text
    assert len(answers(made(0.2), [(film, "who ?")])) == 1


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_pictures_that_are_too_long_are_an_error_and_words_are_not_cut(in_lmms_eval, ratio):
    one, made, answers = in_lmms_eval
    one.model.config.tokenizer_model_max_length = 10
    with pytest.raises(EarlyTomError, match=r"document 0: the prompt has \d+ positions with all tokens, .* takes 10 "):
        answers(made(ratio), [(drawn(1), "who ?")])
    assert len(answers(made(ratio), [(None, "who ?")])) == 1


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_inside_lmms_eval(in_lmms_eval, film, ratio):
    _, made, answers = in_lmms_eval
    documents = [(film, "what is in it ?"), (None, "who ?"), ([[drawn(1), drawn(2)]], "who ?"), (film, "who ?")]
    found = []
    for size in (1, 4):
        lm = made(ratio, size)
        found.append(answers(lm, documents))
        costs = lm.costs()
        assert costs["video_frames"] == (4 + 2 + 4) / 3 and costs["video_tokens"] == pytest.approx(10 * 196 / 3)
        kept = [frames * 196 if ratio is None else round(ratio * frames * 196) for frames in (4, 2, 4)]
        assert costs["video_tokens_kept"] == pytest.approx(sum(kept) / 3)
    assert found[0] == found[1]
