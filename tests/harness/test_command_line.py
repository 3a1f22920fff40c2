"""lmms-eval's own command line with the plugin, on drawn videos: the accuracy of ``earlytom eval --toy``.

The results are read, not only exit codes: lmms-eval ends with 0 after an error. Skipped without lmms-eval;
``make test-eval`` has it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: make test-eval has it")

from transformers import LlavaOnevisionForConditionalGeneration  # noqa: E402

from earlytom_compile.toyworld.evaluate import Arm, evaluate, load_questions  # noqa: E402
from earlytom_compile.toyworld.lmms_task import TASK, write_task  # noqa: E402
from earlytom_compile.toyworld.methods import ALL_TOKENS  # noqa: E402
from earlytom_compile.toyworld.model import WEIGHTS  # noqa: E402

VIDEOS = 16
FRAMES, TOKENS = 8, 128


@dataclass(frozen=True)
class Run:
    """What a run left behind: ``results`` and ``answers`` None where it wrote none."""

    code: int
    printed: str
    results: dict | None
    answers: list[tuple[str, bool]] | None
    """(what was said, whether it was right) by document."""

    @property
    def accuracy(self) -> float:
        return self.results["results"][TASK]["accuracy,none"]

    def cost(self, name: str) -> float:
        return self.results["throughput"][f"avg_{name}"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("toyworld"), videos=VIDEOS)


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory):
    """Calls ``python -m lmms_eval``: (folder of the task, --model_args, more words) -> a Run."""
    home = tmp_path_factory.mktemp("home")

    def run(task: Path, options: str, *words: str, model: str = "earlytom") -> Run:
        output = tmp_path_factory.mktemp("output")
        command = [sys.executable, "-m", "lmms_eval", "--model", model, "--tasks", TASK, "--include_path", str(task)]
        command += ["--model_args", f"pretrained={WEIGHTS},device=cpu,{options}", "--output_path", str(output)]
        offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [*command, "--log_samples", *words], capture_output=True, text=True, env={**os.environ, **offline}
        )
        results, samples = list(output.rglob("*_results.json")), list(output.rglob(f"*_samples_{TASK}.jsonl"))
        printed = done.stdout + done.stderr
        if not results:
            return Run(done.returncode, printed, None, None)
        lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
        lines.sort(key=lambda line: line["doc_id"])
        answers = [(line["filtered_resps"][0], bool(line["accuracy"])) for line in lines]
        return Run(done.returncode, printed, json.loads(results[0].read_text()), answers)

    return run


@pytest.fixture(scope="module")
def toy():
    """What ``earlytom eval --toy`` finds: (method, ratio) -> (accuracy, right or not by question)."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(WEIGHTS).eval()
    questions = load_questions("test", 0, VIDEOS)

    def found(method: str, ratio: float | None) -> tuple[float, list[bool]]:
        result = evaluate(model, questions, Arm(method, ratio))
        return result.accuracy(), result.right[result.asked].tolist()

    return found


COMPRESSED = "retain_ratio=0.1,variant=paper,lowering=eager"
RUNS = [
    ("earlytom", "retain_ratio=full", ALL_TOKENS, None, ("--batch_size", "1")),
    ("earlytom", "retain_ratio=full", ALL_TOKENS, None, ("--batch_size", "4", "--force_simple")),
    ("earlytom", COMPRESSED, "earlytom paper", 0.1, ("--batch_size", "1", "--force_simple")),
    ("earlytom_llava_onevision_hf", COMPRESSED, "earlytom paper", 0.1, ("--batch_size", "4")),
]


@pytest.mark.parametrize("model, options, method, ratio, words", RUNS)
def test_accuracy_is_that_of_the_other_road(model, options, method, ratio, words, task, lmms_eval, toy):
    accuracy, right = toy(method, ratio)
    run = lmms_eval(task, options, *words, model=model)
    assert run.code == 0, run.printed
    assert [answer for _, answer in run.answers] == right
    assert run.accuracy == pytest.approx(accuracy, abs=1e-12) and len(right) > 2 * VIDEOS
    assert (run.cost("video_frames"), run.cost("video_tokens")) == (FRAMES, TOKENS)
    assert run.cost("video_tokens_kept") == (TOKENS if ratio is None else round(ratio * TOKENS))
    assert run.cost("retain_ratio") == (1 if ratio is None else ratio)
    assert run.cost("stage1_retention") == 1 if ratio is None else 0.3 < run.cost("stage1_retention") < 1
    assert 1000 * run.results["throughput"]["total_elapsed_time"] > run.cost("ttft_ms") > 0
    assert "avg_ttft_ms" in run.printed


def test_the_question_is_whether_the_other_road_can_tell_answers_apart(toy):
    assert toy(ALL_TOKENS, None)[0] > toy("earlytom paper", 0.1)[0] > 0.3


def test_a_corrupt_video_among_good_ones_ends_it(lmms_eval, tmp_path):
    task = write_task(tmp_path, videos=3)
    questions = json.loads((task / "questions.json").read_text())
    broken = Path(questions[len(questions) // 2]["video"])
    first = next(place for place, question in enumerate(questions) if question["video"] == str(broken))
    assert 0 < first < len(questions) - 1
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    for words in (("--batch_size", "1"), ("--batch_size", "4", "--force_simple")):
        run = lmms_eval(task, COMPRESSED, *words)
        assert run.code == 1 and run.results is None
        last = run.printed.strip().splitlines()[-1]
        assert last.startswith(f"error: task {TASK}, document {first}: ") and str(broken) in run.printed


@pytest.mark.parametrize(
    "options, says",
    [
        ("retain_ration=0.1", "error: unknown option 'retain_ration'; did you mean 'retain_ratio'?"),
        ("preset=videomme,retain_ratio=0.3", "Table 8 has rows for 0.25, 0.2, 0.15, 0.1"),
        ("batch_size=4", "error: batch_size is given twice"),
    ],
)
def test_a_wrong_argument_ends_it(options, says, task, lmms_eval):
    run = lmms_eval(task, options)
    assert run.code == 1 and run.results is None and says in run.printed


def test_a_question_with_nothing_shown_is_told_of(lmms_eval, tmp_path):
    task = write_task(tmp_path, videos=1)
    code = task / "toyworld_task.py"
    shown = "[doc['video']] if 'how' in doc['question'] else None"
    code.write_text(code.read_text() + f"\n\ndef doc_to_visual(doc):\n    return {shown}\n")
    questions = json.loads((task / "questions.json").read_text())
    bare = [str(place) for place, each in enumerate(questions) if "how" not in each["question"]]
    run = lmms_eval(task, "retain_ratio=full", "--force_simple")
    assert run.code == 0 and 0 < len(bare) < len(questions)
    assert f"task {TASK}, document {', '.join(bare)}: no picture and no video" in run.printed


def test_what_scoring_raises_is_printed_and_leaves_no_results(lmms_eval, tmp_path):
    task = write_task(tmp_path, videos=1)
    code = task / "toyworld_task.py"
    code.write_text(code.read_text() + "\n\ndef process_results(doc, results):\n    raise ValueError('boom')\n")
    run = lmms_eval(task, "retain_ratio=full", "--limit", "1")
    assert (run.code, run.results) == (0, None) and "ValueError: boom" in run.printed
