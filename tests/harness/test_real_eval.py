"""``earlytom eval --tasks`` with the real lmms-eval: the toy world's right answers, counted both ways, and what goes
wrong in a task."""

import json
import re
import shutil

import pytest

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: make test-eval")

from earlytom_compile import EarlyTomConfigError  # noqa: E402
from earlytom_compile.cli.harness import Harness  # noqa: E402
from earlytom_compile.cli.loading import load_model  # noqa: E402
from earlytom_compile.cli.main import main  # noqa: E402
from earlytom_compile.toyworld import evaluate  # noqa: E402
from earlytom_compile.toyworld.lmms_task import write_task  # noqa: E402
from earlytom_compile.toyworld.methods import ALL_TOKENS  # noqa: E402
from earlytom_compile.toyworld.model import WEIGHTS  # noqa: E402

VIDEOS = 6
RATIOS = (0.25, 0.1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """toyworld; "both", a group of toyworld and of "late", which asks about other videos; "videomme_toy", which asks
    about those, too, and is called like a benchmark of Table 8; and three that fail: a video
    is cut off, a task leaves by sys.exit, and one has no number."""
    folder = write_task(tmp_path_factory.mktemp("tasks") / "toyworld", videos=VIDEOS)
    late = write_task(folder.parent / "late", first=VIDEOS, videos=2)
    preset = write_task(folder.parent / "preset", first=VIDEOS, videos=2)
    cut = folder.parent / "cut"
    shutil.copytree(folder, cut)
    for each, name in ((late, "late"), (preset, "videomme_toy"), (cut, "cut")):
        rewritten(each / "toyworld.yaml", ("task: toyworld", f"task: {name}"))
    rewritten(cut / "toyworld.yaml", (str(folder), str(cut)))
    rewritten(cut / "questions.json", (str(folder), str(cut)))
    video = cut / "videos" / "test-2.mp4"
    video.write_bytes(video.read_bytes()[:300])
    (late / "both.yaml").write_text("group: both\ntask:\n  - toyworld\n  - late\n")
    for name, code in (
        ("leaves", "import sys\n\ndef doc_to_visual(doc):\n    sys.exit('video path does not exist')\n"),
        ("silent", "def doc_to_visual(doc):\n    print('a line of noise')\n    return [doc['video']]\n"),
    ):
        other = folder.parent / name
        shutil.copytree(folder, other)
        rewritten(other / "toyworld.yaml", ("task: toyworld", f"task: {name}"), ("toyworld_task", f"{name}_task"))
        moved = other / f"{name}_task.py"
        (other / "toyworld_task.py").rename(moved)
        moved.write_text(moved.read_text() + "\n\n" + code)
    rewritten(other / "toyworld.yaml", ("aggregation: mean", "aggregation: !function silent_task.nothing"))
    moved.write_text(moved.read_text() + "\n\ndef nothing(items):\n    return None\n")
    return folder.parent


def rewritten(path, *changes):
    text = path.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture
def run(tasks, tmp_path, capsys):
    """The command on tasks of the folder: (status, its JSON, what it printed, what it said beside)."""

    def run(names, *more, file=tmp_path / "t.json"):
        words = ["eval", "--tasks", names, "--include-path", tasks, "--model", WEIGHTS, "--device", "cpu"]
        status = main([str(word) for word in (*words, "--json", file, *more)])
        said = capsys.readouterr()
        return status, json.loads(file.read_text()) if file.exists() else None, said.out, said.err

    return run


def counted_by_the_toy(name, ratio, first=0, videos=VIDEOS, options=None):
    questions = evaluate.load_questions("test", first, videos)
    arm = evaluate.Arm(ALL_TOKENS) if ratio is None else evaluate.Arm(name, ratio)
    model = load_model(str(WEIGHTS), device="cpu")
    return 100 * evaluate.evaluate(model, questions, arm, options).accuracy()


@pytest.mark.parametrize("variant, batch", [("paper", 1), ("plus", 4)])
def test_the_table_has_the_accuracies_of_eval_toy(variant, batch, run, tasks, tmp_path):
    more = ["--retain-ratios", ",".join(map(str, RATIOS)), "--variant", variant, "--batch-size", batch]
    status, content, out, err = run("toyworld", *more, "--markdown", tmp_path / "t.md")
    assert status == 0, err
    full, *compressed = content["evaluations"]
    for each in (full, *compressed):
        expected = counted_by_the_toy(f"earlytom {variant}", each["retain_ratio"])
        assert each["percent"] == pytest.approx(expected), each["retain_ratio"]
        assert each["score"]["samples"] == len(json.loads((tasks / "toyworld" / "questions.json").read_text()))
        assert each["costs"]["ttft_ms"] > 0 and each["seconds"] > 0 and each["score"]["empty"] == 0
    tokens = [(each["costs"]["video_tokens"], each["costs"]["video_tokens_kept"]) for each in content["evaluations"]]
    assert tokens == [(128, 128), (128, 32), (128, 13)] and full["costs"]["stage1_retention"] == 1
    saved = "patches_computed" if variant == "plus" else "stage1_retention"
    assert all(each["costs"][saved] < 1 for each in compressed)
    assert content["lmms-eval"] and content["machine"] and content["torch"]
    printed = [line.split() for line in out.splitlines()]
    for row, name in zip(content["rows"], ("all tokens", *[f"earlytom {variant}"] * 2), strict=True):
        (line,) = [line for line in printed if line[:3] == [*name.split(), f"{100 * (row['retain_ratio'] or 1):.0f}%"]]
        assert line[-3:-1] == [f"{row['score']:.1f}"] * 2 and line[-1] == f"{100 * row['of_full_score']:.1f}"
    assert f"| toyworld | 10% | default | {compressed[1]['percent']:.1f} ± " in (tmp_path / "t.md").read_text()


def test_a_group_is_the_mean_of_its_tasks_and_resume_goes_on(run):
    status, first, _, err = run("both", "--retain-ratios", "0.1")
    assert status == 0, err
    of_tasks = [counted_by_the_toy("earlytom plus", 0.1), counted_by_the_toy("earlytom plus", 0.1, VIDEOS, 2)]
    full, compressed = first["evaluations"]
    assert compressed["percent"] == pytest.approx(sum(of_tasks) / 2)
    assert compressed["score"]["subtasks"] == ["late", "toyworld"] and "mean of 2 tasks" in " ".join(first["notes"])
    own = [compressed["results"][name] for name in ("late", "toyworld")]
    assert [100 * values["accuracy,none"] for values in own] == pytest.approx(of_tasks[::-1])
    status, second, _, err = run("both,late", "--retain-ratios", "0.1", "--resume")
    assert status == 0 and "[1/2] late, all tokens" in err and second["evaluations"][:2] == first["evaluations"]


def test_a_benchmark_of_table_8_has_its_settings(run):
    status, content, _, err = run("videomme_toy", "--retain-ratios", "0.1")
    assert status == 0, err
    row = {"tau_seg": 0.3, "merge_layers": (2, 6)}  # layers 10, 21 and 23 of 26: the last two are one of 8
    _, compressed = content["evaluations"]
    assert compressed["settings"] == "videomme"
    assert compressed["percent"] == pytest.approx(counted_by_the_toy("earlytom paper", 0.1, VIDEOS, 2, row))


def test_limit_is_a_number_of_questions(run):
    status, content, out, _ = run("toyworld", "--retain-ratios", "0.1", "--limit", "3")
    assert status == 0 and [each["score"]["samples"] for each in content["evaluations"]] == [3, 3]
    assert "Only the first 3 questions" in " ".join(out.split())


def test_a_broken_video_ends_it_by_name_and_what_was_finished_stays(run, tasks):
    status, content, out, err = run("toyworld,cut", "--retain-ratios", "0.1")
    questions = json.loads((tasks / "cut" / "questions.json").read_text())
    number = next(place for place, each in enumerate(questions) if each["video"].endswith("test-2.mp4"))
    assert status == 2 and out == ""
    (said,) = [line for line in err.splitlines() if line.startswith("earlytom eval: ")]
    assert re.match(rf"earlytom eval: cut, all tokens: task cut, document {number}: '.*/cut/videos/test-2.mp4' ", said)
    assert "has the 1 evaluation before it; the same command with --resume goes on" in said
    assert [(each["task"], each["retain_ratio"]) for each in content["evaluations"]] == [("toyworld", None)]


def test_a_task_that_leaves_does_not_end_us_without_a_word(run):
    status, content, out, err = run("leaves")
    assert (status, content, out) == (2, None, "")
    assert "earlytom eval: leaves, all tokens: " in err and "video path does not exist" in err


def test_a_task_without_a_number_is_refused_and_its_noise_is_not_our_output(run):
    status, content, out, err = run("silent")
    assert (status, content, out) == (2, None, "") and "a line of noise" in err
    assert "lmms-eval gives no number for the metric 'accuracy' of silent" in err


def test_what_lies_behind_an_error_is_told(tasks):
    from lmms_eval.api.model import lmms

    class Model(lmms):
        def generate_until(self, requests):
            raise RuntimeError("tried 5 times") from KeyError("frames")

        loglikelihood = generate_until_multi_round = generate_until

    with pytest.raises(EarlyTomConfigError) as found:
        Harness(str(tasks)).evaluate(Model(), "toyworld", limit=1, said="toyworld, 10%")
    assert str(found.value) == "toyworld, 10%: RuntimeError: tried 5 times, because of KeyError: 'frames'."


@pytest.mark.parametrize(
    "function, code, says",
    [
        ("process_results", "raise ValueError('boom,\\nonce more')", "ValueError: boom, once more."),
        ("process_results", "raise SystemExit(0)", "the task ended the process."),
        ("counted", "raise KeyError('boom')", "KeyError: 'boom'."),
    ],
)
def test_what_scoring_raises_is_told_as_it_is(function, code, says, run, tasks):
    name = f"scoring_{len(list(tasks.iterdir()))}"
    folder = tasks / name
    shutil.copytree(tasks / "toyworld", folder)
    yaml, moved = folder / "toyworld.yaml", (folder / "toyworld_task.py").rename(folder / f"{name}_task.py")
    rewritten(yaml, ("task: toyworld", f"task: {name}"), ("aggregation: mean", "aggregation: !function it.counted"))
    yaml.write_text(yaml.read_text().replace("toyworld_task.", "it.").replace("it.", f"{name}_task."))
    functions = f"def counted(items):\n    return 1\n\n\ndef {function}(*given):\n    {code}\n"
    moved.write_text(f"{moved.read_text()}\n\n{functions}")
    status, content, out, err = run(name, "--limit", "1", "--retain-ratios", "0.1")
    assert (status, content, out) == (2, None, "")
    assert f"earlytom eval: {name}, all tokens: {says} Nothing was finished yet that " in err


def test_an_unknown_task_names_those_that_are_near(run):
    status, _, _, err = run("toyworld,videome")
    assert status == 2 and "lmms-eval has no task 'videome'; near: videomme" in err
