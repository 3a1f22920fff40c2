"""``earlytom run``: what it prints and writes, and that what can be wrong is found before weights are read."""

import json
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinySize, write_checkpoint

from earlytom_compile.cli import comparison, loading
from earlytom_compile.cli import main as cli
from earlytom_compile.cli import run as command
from earlytom_compile.cli.loading import ask_again, checked_config, open_checkpoint, prepare_inputs

EAGER = ["--lowering", "eager", "--device", "cpu"]
FRAMES, TOKENS = 8, 9  # of each frame: a 6x6 grid, pooled to 3x3
BEFORE, KEPT = FRAMES * TOKENS, round(0.1 * FRAMES * TOKENS)


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights fails the test."""

    def never(*arguments):
        raise AssertionError("weights were read before the mistake was found")

    monkeypatch.setattr(loading, "_read_weights", never)


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def ask(checkpoint, clip, *more):
    return ["run", "--model", checkpoint, "--video", clip, "--prompt", "What is it?", *EAGER, *more]


@pytest.fixture(scope="module")
def answered(checkpoint, clip, tmp_path_factory, shared):
    """One call for all that look at its output: two questions about two videos, as JSON and on the screen."""
    import contextlib
    import io

    file, out, err = tmp_path_factory.mktemp("run") / "run.json", io.StringIO(), io.StringIO()
    words = [*ask(checkpoint, clip, "--retain-ratio", "0.1", "--max-new-tokens", "3", "--json", file)]
    words += ["--video", clip, "--prompt", "Who is it, and where?", "--frames", FRAMES]
    with shared(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(list(map(str, words))) == 0
    return json.loads(file.read_text()), out.getvalue(), err.getvalue()


def test_json_has_answers_tokens_frames_times_and_options(answered, clip):
    content, printed, _ = answered
    questions = ["What is it?", "Who is it, and where?"]
    asked = [(answer["video"], answer["prompt"]) for answer in content["answers"]]
    assert asked == [(str(clip), question) for _ in range(2) for question in questions]
    for answer in content["answers"]:
        assert answer["compressed"] and answer["video_tokens"] == [BEFORE, KEPT]
        assert answer["frames"][0] == FRAMES and len(answer["frames"]) == 1 + len(answer["merge_layers"])
        before, after = answer["prompt_tokens"]
        assert before - after == BEFORE - KEPT
        assert 1 <= answer["tokens"] <= 3 and answer["seconds"] > 0
    assert content["answers"][0]["compile_seconds"] > 0
    assert content["options"]["retain_ratio"] == 0.1 and content["options"]["lowering"] == "eager"
    assert content["options"]["inner_layer"] is None and content["torch"] == torch.__version__
    # The same video and question give the same answer, and that is what was printed.
    answers = [answer["answer"] for answer in content["answers"]]
    assert answers[:2] == answers[2:]
    lines = printed.splitlines()
    assert lines[0::2] == [f"{clip}: {question}" for question in questions] * 2 and lines[1::2] == answers


def test_the_summary_tells_compilation_apart(answered):
    first, second, *_ = (line for line in answered[2].splitlines() if "video tokens" in line)
    assert re.search(r"3 tokens in \d+\.\d s, \d+\.\d s of it compilation", first)
    assert f"video tokens {BEFORE} -> {KEPT}" in second


def test_another_question_has_the_inputs_it_would_have_alone(checkpoint, clip):
    opened, console = open_checkpoint(str(checkpoint), device="cpu"), Console(quiet=True)
    first = prepare_inputs(opened, clip, "What?", frames=FRAMES, progress_on=console)
    alone = prepare_inputs(opened, clip, "And who goes there?", frames=FRAMES, progress_on=console)
    again = ask_again(opened, first, "And who goes there?")
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[name], alone[name]) for name in alone)


def test_json_on_the_standard_output_is_all_there_is(earlytom, checkpoint, clip, monkeypatch):
    monkeypatch.setattr(command, "timed_answer", lambda model, inputs, most: ([], 0.5))
    status, out, err = earlytom(*ask(checkpoint, clip, "--frames", 8, "--quiet", "--json"))
    (answer,) = json.loads(out)["answers"]
    assert status == 0 and err == ""
    assert (answer["answer"], answer["tokens"], answer["compressed"]) == ("", 0, False)
    assert answer["video_tokens"] is None and answer["frames"] == [8]


@pytest.mark.usefixtures("sharing")
def test_the_full_model_keeps_all_tokens_for_every_question(earlytom, checkpoint, clip, tmp_path):
    questions, file = ["What is it?", "Who is it, and where?", "Why?"], tmp_path / "both.json"
    prompts = [word for question in questions[1:] for word in ("--prompt", question)]
    more = ["--frames", FRAMES, "--retain-ratio", "0.1", "--max-new-tokens", "4", "--compare", "--repeats", "1"]
    status, out, _ = earlytom(*ask(checkpoint, clip, *more, *prompts, "--json", file))
    answers = json.loads(file.read_text())["answers"]
    loaded = loading.load_checkpoint(str(checkpoint), device="cpu")
    for question, answer in zip(questions, answers, strict=True):
        inputs = prepare_inputs(loaded, clip, question, frames=FRAMES, progress_on=Console(quiet=True))
        tokens = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = loaded.processor.decode(tokens, skip_special_tokens=True).strip()
        assert answer["full_model"]["answer"] == said and answer["compressed"]
        assert answer["agree"] == (answer["answer"] == said)
    assert not all(answer["agree"] for answer in answers)  # else this would hold for two compressed models too
    assert status == 0 and out.count("answers agree") == len(questions)


def test_quiet_comparisons_are_two_answers(earlytom, checkpoint, clip, monkeypatch):
    monkeypatch.setattr(comparison, "timed_answer", lambda model, inputs, most: ([], 0.5))
    status, out, err = earlytom(*ask(checkpoint, clip, "--frames", 8, "--quiet", "--compare"))
    assert (status, out, err) == (0, "full model: \ncompressed: \n", "")


def test_ctrl_c_says_which_answers_are_saved(earlytom, checkpoint, clip, tmp_path, monkeypatch):
    answers = iter([([2], 0.5)])

    def timed(*given):
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(command, "timed_answer", timed)
    file = tmp_path / "run.json"
    more = ["--frames", 8, "--prompt", "Who?", "--json", file]
    status, _, err = earlytom(*ask(checkpoint, clip, *more))
    assert status == 130 and f"stopped: {file} has 1 of 2 answers." in " ".join(err.split())
    assert len(json.loads(file.read_text())["answers"]) == 1


def test_an_empty_answer_is_said_to_be_empty(earlytom, checkpoint, clip, monkeypatch):
    monkeypatch.setattr(command, "timed_answer", lambda model, inputs, most: ([2], 0.5))  # <|im_end|>
    status, out, err = earlytom(*ask(checkpoint, clip, "--frames", 8))
    assert status == 0 and out == "(empty answer)\n"
    assert "none of them is text" in err
    status, out, err = earlytom(*ask(checkpoint, clip, "--frames", 8, "--quiet"))
    assert (status, out, err) == (0, "\n", "")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4"),
        (["--frames", "500"], "fewer than the 500 asked for"),
        (["--frames", "0"], "frames=0"),
        (["--prompt", "  "], "prompt='  ': must be a question"),
        (["--prompt", "what is <video>?"], "<video> stands for the video itself"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--repeats", "0", "--compare"], "repeats=0"),
        (["--repeats", "3"], "repeats=3 without --compare"),
        (["--no-reuse", "--merge-layers", "1,9"], "layer 9 does not exist"),
        (["--full-layers", "1,9"], "layer 9 does not exist"),
        (["--merge-layers", "1,2"], "the default, which reuses patches"),
        (["--retain-ratio", "2"], "retain_ratio=2.0"),
        (["--json", "/proc/nothing/run.json"], "json='/proc/nothing/run.json': there is no folder '/proc/nothing'"),
        (["--json", "."], "that is a folder"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(more, message, no_weights, earlytom, checkpoint, clip):
    given = ask(checkpoint, clip)
    if more[0] == "--prompt":  # instead of the good one, which would be another question
        given[given.index("--prompt") : given.index("--prompt") + 2] = []
    status, out, err = earlytom(*given, *more)
    assert (status, out) == (2, "") and message in err
    assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def without_a_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    of = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of}))


def broken_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def broken_settings(folder):
    (folder / "processor_config.json").write_text("{")


def odd_config(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "vision_config": 3}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "model.safetensors' is damaged"),
        (emptied, "model.safetensors' is damaged"),
        (pointer, "git lfs pull"),
        (without_a_shard, "1 of its 2 files of weights are missing (model-00002-of-00002.safetensors)"),
        (broken_index, "is no index of weights"),
        (broken_tokenizer, "the processor of"),
        (broken_settings, "processor"),
        (odd_config, "config.json of"),
    ],
)
def test_damaged_checkpoints_are_one_line(damage, message, no_weights, earlytom, copied, clip):
    damage(copied)
    status, out, err = earlytom(*ask(copied, clip, "--frames", 8))
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1


def test_weights_that_do_not_fit_config_json_are_no_random_numbers(earlytom, copied, clip):
    weights = load_file(copied / "model.safetensors")
    name = next(name for name in sorted(weights) if "layers.1" in name)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, copied / "model.safetensors")
    status, _, err = earlytom(*ask(copied, clip, "--frames", 8))
    assert status == 2 and "lack 1 tensors that config.json asks for" in err


def test_sharded_weights_are_whole(copied):
    weights = load_file(copied / "model.safetensors")
    whole = loading.load_model(str(copied), device="cpu").state_dict()
    without_a_shard(copied)
    rest = sorted(weights)[1::2]
    save_file({name: weights[name] for name in rest}, copied / "model-00002-of-00002.safetensors")
    loaded = loading.load_model(str(copied), device="cpu").state_dict()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(loading.EarlyTomConfigError, match="cannot be loaded: KeyError.*metadata"):
        loading.load_model(str(copied), device="cpu")


def test_frames_are_those_the_checkpoint_was_made_for_where_it_says_so(copied):
    assert open_checkpoint(str(copied), device="cpu").frames == 32
    settings = copied / "video_preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_frames": 5}))
    assert open_checkpoint(str(copied), device="cpu").frames == 5
    assert open_checkpoint(str(loading.Path(__file__).parents[2] / "examples/toyworld/weights")).frames == 8
    # A processor saved by transformers has all settings in one file.
    (copied / "processor_config.json").write_text(json.dumps({"video_processor": {"num_frames": 7}}))
    assert loading.frames_of(str(copied)) == 7
    (copied / "processor_config.json").write_text(json.dumps({"video_processor": {"num_frames": None, "size": 3}}))
    assert loading.frames_of(str(copied)) == 32


def test_the_default_reaches_the_video(earlytom, copied, clip, monkeypatch):
    settings = copied / "video_preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_frames": 5}))
    monkeypatch.setattr(command, "timed_answer", lambda model, inputs, most: ([], 0.5))
    _, out, _ = earlytom(*ask(copied, clip, "--json"))
    assert json.loads(out)["answers"][0]["frames"] == [5]


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("nowhere", "./nowhere", "/wrong/path", "checkpoints/lava", "a/b/c", "~/nowhere/at/all"):
        with pytest.raises(loading.EarlyTomConfigError, match="no checkpoint folder at"):
            checked_config(name)


def test_a_layer_behind_the_one_that_is_used_does_not_exist(tmp_path):
    folder = write_checkpoint(tmp_path / "deep", TinySize(48, 8, 4, 64, 1, 64))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "vision_feature_layer": -2}))
    open_checkpoint(str(folder), options={"full_layers": (2,)})
    with pytest.raises(loading.EarlyTomConfigError, match="layer 3 does not exist"):
        open_checkpoint(str(folder), options={"full_layers": (3,)})
