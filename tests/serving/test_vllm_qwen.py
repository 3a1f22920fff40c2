"""Qwen2.5-VL and Qwen3-VL in vLLM say what they say in transformers with ``earlytom_compile.compile``: the same prompt,
embedding by embedding and position by position, and so the same words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("torchvision", reason="transformers' processors of Qwen need torchvision")

from qwen_checkpoints import EVERYTHING, OPTIONS, SHAPES, Engine, Oracle, Question, checkpoint, film, picture
from tiny_qwen_checkpoint import require_family

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.vllm import qwen_vl

pytestmark = pytest.mark.long

LONG, WIDE = film(16, seed=0), film(10, seed=1, height=112, width=112)
QUESTIONS = {
    "one video": Question("V what happens in the video ?", (LONG,)),
    "two videos": Question("first V then V describe the shapes", (LONG, WIDE)),
    "an image before": Question("I and V what is it ?", (WIDE,), (picture(2),)),
    "an image behind": Question("V and I what is it ?", (LONG,), (picture(2),)),
    "of one frame": Question("V what is it ?", (WIDE[:2],)),
    "between seconds": Question("V what is a bar ?", (LONG,), fps=3.2),
    "far apart": Question("V what is it ?", (LONG,), fps=0.04),
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """Of a checkpoint."""
    require_family(SHAPES[request.param])
    return checkpoint(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(scope="module")
def engine(folder):
    """All prompts are longer than a chunk of it."""
    engine = Engine(folder, OPTIONS, chunk=32)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(folder):
    """Compresses as the server does."""
    return Oracle(folder, OPTIONS)


@pytest.fixture(scope="module")
def uncompressed(folder):
    """Does not."""
    return Oracle(folder, None)


@pytest.mark.parametrize("name", QUESTIONS)
def test_as_in_transformers(engine, oracle, name):
    """Prompts that are read in chunks, videos cut between them."""
    expected = oracle.ask(QUESTIONS[name])
    engine.forget()
    (answer,) = engine.ask([QUESTIONS[name]])
    assert answer.cached == 0
    assert torch.equal(answer.positions, expected.positions)
    assert_close(answer.embeddings, expected.embeddings, atol=1e-3, rtol=1e-3)
    assert answer.tokens == expected.tokens


def test_a_known_video_is_not_encoded_again(engine, oracle, monkeypatch):
    """Its keys and values are there, of the same positions; what is asked about it is other text."""
    engine.ask([Question("V what happens in the video ? first the circle grows", (LONG,))])
    monkeypatch.setattr(type(engine.model), "_embed_videos", None)
    question = Question("V what happens in the video ? describe the shapes", (LONG,))
    expected = oracle.ask(question)
    (answer,) = engine.ask([question])
    assert answer.cached > 0
    assert torch.equal(answer.positions, expected.positions[:, answer.cached :])
    assert answer.tokens == expected.tokens


def test_uncompressed_on_request(engine, uncompressed):
    """By vLLM's own encoder, beside one that is compressed."""
    question = Question("V what happens in the video ?", (LONG,), options=False)
    expected = uncompressed.ask(question)
    (answer,) = engine.ask([question])
    assert torch.equal(answer.positions, expected.positions)
    assert answer.tokens == expected.tokens


def test_nothing_left_out_is_uncompressed(engine, uncompressed):
    """All tokens through the compressed path."""
    question = Question("I what happens in V ?", (LONG,), (picture(2),), options=EVERYTHING)
    expected = uncompressed.ask(question)
    (answer,) = engine.ask([question])
    assert torch.equal(answer.positions, expected.positions)
    assert answer.tokens == expected.tokens


def test_many_at_once(engine, oracle, uncompressed):
    """Steps that have chunks of several requests in them, and generated tokens of others."""
    plain = [Question("what is a circle ?"), Question("V what happens ?", (WIDE,), options=False)]
    several = [*QUESTIONS.values(), *plain]
    expected = [oracle.ask(each) for each in QUESTIONS.values()] + [uncompressed.ask(each) for each in plain]
    assert [answer.tokens for answer in engine.ask(several)] == [answer.tokens for answer in expected]


def test_rows_that_were_given_stay(engine, uncompressed, monkeypatch):
    """What was encoded elsewhere is not planned as if it were to be compressed."""
    question = Question("V what is a circle ?", (film(8, seed=3),))
    calls, rows, own = [], [], type(engine.model).embed_multimodal
    monkeypatch.setattr(type(engine.model), "embed_multimodal", lambda model, **call: _noted(own(model, **call), call))

    def _noted(made, call):
        calls.append(call)
        rows.extend(made)
        return made

    expected = uncompressed.ask(question)
    engine.ask([replace(question, options=False)])
    encoded = {"video_embeds": rows[0], "video_grid_thw": calls[0]["video_grid_thw"]}
    if "timestamps" in calls[0]:
        encoded["timestamps"] = calls[0]["timestamps"]
    (answer,) = engine.ask([replace(question, videos=(), encoded=encoded)])
    assert torch.equal(answer.positions, expected.positions)
    assert answer.tokens == expected.tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_are_exact_in_channels_of_rows(dtype):
    """Up to where three digits go."""
    numbers = torch.tensor([[0, 1, 255], [256, 257, 65535], [65536, 70001, 256**3 - 1]])
    assert torch.equal(qwen_vl._read(qwen_vl._written(numbers).to(dtype)), numbers)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=2, use_ubatching=False)},
            "--pipeline-parallel-size 2",
        ),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=1, use_ubatching=True)}, "--enable-dbo"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "--speculative-config"),
        ({"ec_transfer_config": SimpleNamespace()}, "--ec-transfer-config"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "--enable-tower-connector-lora"),
        ({}, None),
    ],
)
def test_refused_at_load(given, flag):
    multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: False, video_pruning_rate=None)
    usual = {
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        "speculative_config": None,
        "ec_transfer_config": None,
        "lora_config": None,
        "model_config": SimpleNamespace(get_multimodal_config=lambda: multimodal),
    }
    found = qwen_vl.ServesPlaces.not_done(SimpleNamespace(**{**usual, **given}))
    refused = [name for name, (is_given, _) in found.items() if is_given]
    assert [name.partition(" or ")[0].startswith(flag) for name in refused] == ([True] if flag else [])


def test_positions_that_the_model_does_not_know_are_refused(engine):
    """In the front end: in the worker they would be read from behind a table's end."""
    years = Question("V what is it ?", (LONG,), fps=1e-6)
    if hasattr(engine.model.config.vision_config, "tokens_per_second"):
        with pytest.raises(EarlyTomConfigError, match="the model knows 128000"):
            engine.ask([years])
    with pytest.raises(EarlyTomConfigError, match="positions up to 128000"):
        qwen_vl.require_positions(128000, engine.model.config)


def test_patches_of_another_size_are_refused(engine):
    """In the front end: in the worker they would be the end of it."""
    vision = engine.model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([2, 4, 4])
    whole = {"pixel_values_videos": torch.zeros(32, width), "video_grid_thw": grid}
    qwen_vl.require_patches(whole, engine.model.config)
    for wrong in ({"pixel_values_videos": torch.zeros(32, width + 3)}, {"video_grid_thw": torch.tensor([2, 3, 4])}):
        with pytest.raises(EarlyTomConfigError, match="as the model's processor made them"):
            qwen_vl.require_patches({**whole, **wrong}, engine.model.config)
