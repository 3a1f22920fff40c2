"""The toy world through vLLM: every single answer is the one that docs/accuracy/methods.json has on record."""

import json
from pathlib import Path

import numpy as np
import pytest
from engine_process import Engine

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm")

from earlytom_compile.toyworld.answers import prompt_ids
from earlytom_compile.toyworld.batches import IDS
from earlytom_compile.toyworld.evaluate import Result, load_questions
from earlytom_compile.toyworld.questions import CATEGORIES

RECORDED = Path(__file__).parents[2] / "docs/accuracy/methods.json"
AT_ONCE = 500

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def questions(recorded):
    return load_questions(recorded["split"], recorded["first video"], recorded["videos"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("earlytom paper", {"retain_ratio": 0.1, "variant": "paper"}),
        ("earlytom plus", {"retain_ratio": 0.1}),
        ("visionzip", {"retain_ratio": 0.25, "method": "visionzip"}),
    ],
)
def test_answers_are_those_on_record(toy, recorded, questions, method, options):
    (row,) = (
        row for row in recorded["results"] if (row["method"], row["retain_ratio"]) == (method, options["retain_ratio"])
    )
    expected = Result.from_dict(row)
    pairs = [
        (video, frames.numpy(), question)
        for video, (frames, asked) in enumerate(zip(questions.frames, questions.asked, strict=True))
        for question in asked
    ]
    right = np.zeros_like(expected.right)
    with Engine(model=str(toy), mm_processor_kwargs={"earlytom": options}) as engine:
        for first in range(0, len(pairs), AT_ONCE):
            some = pairs[first : first + AT_ONCE]
            requests = [
                {"prompt_token_ids": prompt_ids(question, 1), "multi_modal_data": {"video": frames}}
                for _, frames, question in some
            ]
            for answer, (video, _, question) in zip(engine.ask(requests), some, strict=True):
                right[video, CATEGORIES.index(question.category)] = answer.words[0] == IDS[question.answer]
    assert right.sum() / expected.asked.sum() == pytest.approx(row["accuracy"], abs=1e-12)
    assert np.array_equal(right, expected.right)
