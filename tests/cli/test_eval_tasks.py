"""``earlytom eval --tasks`` without lmms-eval, which a stand-in plays: what runs, is saved, gone on with and refused.

The real one is in tests/harness.
"""

import importlib.util
import json

import pytest

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli import eval_tasks
from earlytom_compile.cli.eval_model import look_at_checkpoint
from earlytom_compile.cli.harness import require_lmms_eval
from earlytom_compile.shapes import SHAPES

RIGHT = {"a": 0.5, "mvbench": 60.0}
NO_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is None


class StandIn:
    """lmms-eval and the plugin's model at once; ``stop_at``: the number of the evaluation that ends in ``error``."""

    def __init__(self):
        self.asked, self.looked_at, self.loaded = [], [], []
        self.stop_at, self.error = None, KeyboardInterrupt()
        self.documents = ["x", "y"]

    def __call__(self, include_path):
        assert include_path is None
        self.loaded = []
        return self

    def require_tasks(self, names):
        if wrong := set(names) - set(RIGHT):
            raise EarlyTomConfigError(f"no task {sorted(wrong)}")

    def look_at(self, name):
        assert not self.loaded, "the model was loaded before a task was looked at"
        self.looked_at.append(name)

    def load(self, arguments, subject, own):
        self.loaded.append((arguments.model, arguments.batch_size, arguments.frames))
        return self

    def use(self, retain_ratio, **options):
        self.ratio, self.options = retain_ratio, options

    def costs(self):
        return {"retain_ratio": self.ratio or 1.0, "ttft_ms": 100.0 * (self.ratio or 1)}

    def evaluate(self, model, name, *, limit, said):
        assert model is self and said.startswith(name)
        if len(self.asked) == self.stop_at:
            raise self.error
        self.asked.append((name, self.ratio, self.options, limit))
        value = RIGHT[name] * (1 if self.ratio is None else 0.9)
        return {
            "results": {name: {"alias": name, "m,none": value}},
            "configs": {name: {"metric_list": [{"metric": "m"}]}},
            "n-samples": {name: {"effective": limit or 7}},
            "throughput": {"avg_speed": 5.0},
            "samples": {name: [{"doc_hash": each} for each in self.documents]},
        }


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(eval_tasks, "Harness", found)
    monkeypatch.setattr(eval_tasks, "load_model", found.load)
    monkeypatch.setattr(eval_tasks, "require_lmms_eval", lambda: "0.7.3")
    return found


@pytest.fixture
def words(checkpoint):
    return ["eval", "--tasks", "a,mvbench", "--model", checkpoint, "--retain-ratios", "0.2,0.1", "--device", "cpu"]


def test_the_full_model_first_then_every_ratio_with_one_model(stand_in, words, checkpoint, tmp_path, earlytom):
    files = ["--json", tmp_path / "t.json", "--markdown", tmp_path / "t.md"]
    status, out, err = earlytom(*words, "--variant", "plus", "--batch-size", "2", "--limit", "3", *files)
    assert status == 0, err
    plus = {"lowering": "eager", "strict": True, "variant": "plus"}
    preset = {**plus, "preset": "mvbench"}
    assert stand_in.asked == [
        ("a", None, {}, 3), ("mvbench", None, {}, 3), ("a", 0.2, plus, 3), ("mvbench", 0.2, preset, 3),
        ("a", 0.1, plus, 3), ("mvbench", 0.1, preset, 3),
    ]  # fmt: skip
    assert stand_in.loaded == [(str(checkpoint), 2, None)] and stand_in.looked_at == ["a", "mvbench"]
    lines = [line.split() for line in out.splitlines()]
    assert ["all", "tokens", "100%", "–", "–", "100", "5.0", "50.0", "60.0", "55.0", "100.0"] in lines
    assert ["earlytom", "plus", "10%", "–", "–", "10", "5.0", "45.0", "54.0", "49.5", "90.0"] in lines
    assert "[6/6] mvbench, 10%" in err and "Only the first 3 questions" in " ".join(out.split())
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["lmms-eval"] == "0.7.3" and content["options"] == plus and content["limit"] == 3
    assert [(each["task"], each["percent"], each["score"]["samples"]) for each in content["evaluations"]][:3] == [
        ("a", 50.0, 3), ("mvbench", 60.0, 3), ("a", pytest.approx(45.0), 3),
    ]  # fmt: skip
    assert "| mvbench | 20% | mvbench | 54.0 |" in (tmp_path / "t.md").read_text()


def test_ctrl_c_saves_what_is_finished_and_resume_goes_on(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "t.json"
    stand_in.stop_at = 3
    status, out, err = earlytom(*words, "--json", file)
    assert status == 130 and out == "" and f"{file} has 3 of 6 evaluations; the same command with --resume" in err
    first = json.loads(file.read_text())["evaluations"]
    assert [(each["task"], each["retain_ratio"]) for each in first] == [("a", None), ("mvbench", None), ("a", 0.2)]
    stand_in.stop_at = None
    status, table, _ = earlytom(*words, "--json", file, "--resume")
    keys = [(task, ratio) for task, ratio, *_ in stand_in.asked]
    assert status == 0 and keys[3:] == [("mvbench", 0.2), ("a", 0.1), ("mvbench", 0.1)] and len(set(keys)) == 6
    assert json.loads(file.read_text())["evaluations"][:3] == first
    # All is there: nothing is loaded any more, and the table is the same.
    stand_in.loaded.clear()
    status, again, _ = earlytom(*words, "--json", file, "--resume")
    assert status == 0 and again == table and len(stand_in.asked) == 6 and not stand_in.loaded


def test_resume_with_fewer_tasks_keeps_the_others_in_the_file(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "t.json"
    assert earlytom(*words, "--json", file)[0] == 0
    fewer = [*words[:2], "mvbench", *words[3:6], "0.25", *words[7:]]
    status, out, _ = earlytom(*fewer, "--json", file, "--resume")
    assert status == 0 and [key[:2] for key in stand_in.asked[6:]] == [("mvbench", 0.25)]
    assert "mvbench" in out and "  a  " not in out
    assert len(json.loads(file.read_text())["evaluations"]) == 7


@pytest.mark.parametrize(
    "more, says",
    [
        (["--limit", "2"], "limit=None, and this would be limit=2"),
        (["--variant", "plus"], "variant"),
        (["--batch-size", "4"], "batch_size=1, and this would be batch_size=4"),
        (["--preset", "none"], "preset=None, and this would be preset='none'"),
    ],
)
def test_resume_of_something_else_is_refused(more, says, stand_in, words, tmp_path, earlytom):
    assert earlytom(*words, "--json", tmp_path / "t.json")[0] == 0
    status, _, err = earlytom(*words, *more, "--json", tmp_path / "t.json", "--resume")
    assert status == 2 and says in err and len(stand_in.asked) == 6


def test_other_questions_do_not_belong_into_one_table(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "t.json"
    assert earlytom(*words, "--json", file)[0] == 0
    before, stand_in.documents = file.read_text(), ["x", "z"]
    status, _, err = earlytom(*words[:5], "--retain-ratios", "0.25", *words[7:], "--json", file, "--resume")
    assert status == 2 and "a asks other questions than when" in err and file.read_text() == before


def test_the_order_of_questions_is_nothing(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "t.json"
    assert earlytom(*words, "--json", file)[0] == 0
    stand_in.documents.reverse()
    assert earlytom(*words[:5], "--retain-ratios", "0.25", *words[7:], "--json", file, "--resume")[0] == 0


def test_times_of_several_runs_do_not_compare(stand_in, words, tmp_path, earlytom, monkeypatch):
    file, note = tmp_path / "t.json", "Evaluated in 2 runs of the command"
    stand_in.stop_at = 3
    earlytom(*words, "--json", file)
    stand_in.stop_at = None
    monkeypatch.setattr(eval_tasks, "_BEGUN", "later")
    status, out, _ = earlytom(*words, "--json", file, "--resume")
    assert status == 0 and note in " ".join(out.split())
    assert note not in earlytom(*words, "--json", tmp_path / "new.json")[1]


def test_finished_work_is_not_written_over(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "t.json"
    assert earlytom(*words, "--json", file)[0] == 0
    before = file.read_text()
    status, _, err = earlytom(*words, "--json", file)
    assert status == 2 and f"{file} has 6 evaluations of before: go on with --resume" in err
    assert file.read_text() == before and len(stand_in.asked) == 6
    file.write_text("{}")
    assert earlytom(*words, "--json", file)[0] == 0


def test_an_error_ends_the_command_and_leaves_what_is_finished(stand_in, words, tmp_path, earlytom):
    stand_in.stop_at, stand_in.error = 2, EarlyTomConfigError("a, 20%: document 5: broken.mp4 is broken.")
    file = tmp_path / "t.json"
    status, out, err = earlytom(*words, "--json", file)
    assert status == 2 and out == ""
    assert f"eval: a, 20%: document 5: broken.mp4 is broken. {file} has the 2 evaluations before it;" in err
    assert len(json.loads(file.read_text())["evaluations"]) == 2
    status, _, err = earlytom(*words)
    assert status == 2 and "Nothing was saved; with --json FILE" in err


def test_a_preset_or_a_setting_that_is_given_is_taken(stand_in, words, earlytom):
    assert earlytom(*words, "--preset", "videomme-0.5b", "--tau-seg", "0.4", "--lowering", "staged")[0] == 0
    (options,) = {tuple(sorted(options.items())) for _, ratio, options, _ in stand_in.asked if ratio}
    of_table_8 = {"preset": "videomme-0.5b", "variant": "paper", "tau_seg": 0.4}
    assert dict(options) == {**of_table_8, "lowering": "staged", "strict": True}


def test_json_to_the_standard_output_is_json_alone(stand_in, words, earlytom):
    status, out, err = earlytom(*words, "--json", "-")
    assert status == 0 and len(json.loads(out)["evaluations"]) == 6 and "all tokens" in err


@pytest.mark.parametrize(
    "more, says",
    [
        (["--toy"], "give one of --toy"),
        (["--videos", "3"], "videos=3: that goes with --toy"),
        (["--methods", "random"], "goes with --toy"),
        (["--plot", "."], "goes with --toy"),
        (["--video", __file__], "earlytom compare"),
        (["--limit", "0"], "limit=0: must be at least 1"),
        (["--frames", "0"], "frames=0: must be at least 1"),
        (["--batch-size", "-1"], "batch_size=-1: must be at least 1"),
        (["--resume"], "--resume without --json FILE"),
        (["--tau-seg", "0.5", "--mode", "max-autotune"], "nothing is compiled"),
        (["--merge-layers", "2,9"], "layer 9 does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(more, says, stand_in, words, earlytom):
    status, _, err = earlytom(*words, *more)
    assert status == 2 and says in err and not stand_in.loaded


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "give one of --toy (the toy world that comes along), --tasks"),
        (["--tasks", "a"], "--tasks needs --model"),
        (["--tasks", "b", "--model", "CHECKPOINT"], "no task"),
        (["--tasks", "a", "--model", "/nowhere"], "no checkpoint folder at '/nowhere'"),
        (["--tasks", "a,a", "--model", "CHECKPOINT"], "tasks: a is there twice"),
        (["--tasks", "a", "--model", "CHECKPOINT", "--retain-ratios", "0.1,1.5"], "1.5 must be in (0, 1]"),
        (["--toy", "--limit", "3"], "limit=3: that goes with --tasks"),
        (["--toy", "--preset", "videomme"], "preset='videomme': that goes with --tasks"),
        (["--toy", "--no-strict"], "strict=False: that goes with --tasks"),
    ],
)
def test_other_mistakes(words, says, stand_in, checkpoint, earlytom):
    status, _, err = earlytom("eval", *(str(checkpoint) if word == "CHECKPOINT" else word for word in words))
    assert status == 2 and says in err and not stand_in.loaded


@pytest.mark.skipif(not NO_LMMS_EVAL, reason="lmms-eval is installed")
def test_without_lmms_eval_the_error_says_what_to_install(words, earlytom):
    status, _, err = earlytom(*words)
    assert status == 2 and "lmms-eval, which is not installed: pip install '.[eval]' in the repository" in err


def test_a_folder_of_that_name_is_no_lmms_eval(tmp_path, monkeypatch):
    (tmp_path / "lmms_eval").mkdir()
    if NO_LMMS_EVAL:
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EarlyTomConfigError, match=r"pip install '\.\[eval\]'"):
        require_lmms_eval()


@pytest.mark.parametrize("width, half_billion", [(896, True), (3584, False)])
def test_checkpoints_of_llavas_own_code_are_looked_at_without_it(width, half_billion, tmp_path):
    sizes = {"hidden_size": width, "num_hidden_layers": 24, "intermediate_size": 4864}
    content = {"architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "siglip-so400m-patch14-384", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = look_at_checkpoint(str(tmp_path), device="cpu", dtype="auto", options={})
    assert (found.kind, found.half_billion) == ("EarlyTomLlavaOnevision", half_billion)
    assert found.shape == (SHAPES["llava-onevision-0.5b"] if half_billion else None)


def test_checkpoints_of_transformers_are_the_plugins_others(checkpoint):
    found = look_at_checkpoint(str(checkpoint), device="cpu", dtype="auto", options={})
    assert (found.kind, found.half_billion, found.device.type) == ("EarlyTom", False, "cpu")
    assert found.shape.vision_layers == 4
