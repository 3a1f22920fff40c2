"""``earlytom compare``: its numbers against transformers' own forward, its choice, its files."""

import csv
import io
import json
import math
import statistics

import pytest
import torch
from effort import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest

import earlytom_compile
from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli.compare import log_probabilities
from earlytom_compile.cli.loading import load_checkpoint, prepare_inputs
from earlytom_compile.cli.quality import KEPT, Setting, Summary, interval, nats, recommendation, recommended
from earlytom_compile.cli.questions import Question, read_questions
from earlytom_compile.toyworld.model import WEIGHTS
from earlytom_compile.toyworld.questions import ask
from earlytom_compile.toyworld.world import rng_of, sample_video, write_mp4

FRAMES, TOKENS = 8, 16  # of each frame of the toy world
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of the toy world, and a question about each with its answer."""
    folder = tmp_path_factory.mktemp("videos")
    questions = folder / "questions.csv"
    with questions.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("video", "question", "answer"))
        for seed in range(2):
            video = sample_video("test", seed)
            write_mp4(video, folder / f"{seed}.mp4")
            for question in list(ask(video, rng_of("test", seed, stream=3)).values())[:2]:
                writer.writerow((f"{seed}.mp4", question.text, question.answer))
    return folder


def compare(earlytom, videos, *more, model=WEIGHTS):
    usual = {"--model": model, "--videos": videos, "--questions": videos / "questions.csv", "--frames": FRAMES}
    given = [part for flag, value in usual.items() if flag not in more for part in (flag, value)]
    return earlytom("compare", *given, *more)


# --- The numbers ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("sharing")
@torch.no_grad()
def test_log_probabilities_are_those_of_transformers_on_the_same_cut_prompt(videos):
    loaded = load_checkpoint(str(WEIGHTS), device="cpu")
    inputs = prepare_inputs(loaded, videos / "0.mp4", "what shape is it ?", frames=FRAMES, progress_on=QUIET)
    model = earlytom_compile.compile(loaded.model, retain_ratio=0.1, lowering="eager")
    encoded = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    answer = [7, 3, 12, 5]
    got = log_probabilities(model, {**inputs, "pixel_values_videos": encoded}, answer)
    pixels = log_probabilities(model, inputs, answer)
    earlytom_compile.restore(model)

    ids, token = inputs["input_ids"][0].tolist(), model.config.video_token_id
    first = ids.index(token)
    text = model.get_input_embeddings()(inputs["input_ids"][0])
    prompt = torch.cat((text[:first], encoded[0], text[first + ids.count(token) :]))
    expected = []
    for place, chosen in enumerate(answer):  # one call for each token, nothing kept in between
        before = model.get_input_embeddings()(torch.tensor(answer[:place], dtype=torch.int64))
        logits = model(inputs_embeds=torch.cat((prompt, before))[None]).logits[0, -1].double()
        expected.append((logits[chosen] - logits.logsumexp(0)).item())
    assert got == pytest.approx(expected, abs=1e-4) and pixels == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("sharing")
def test_all_tokens_lose_nothing_and_fewer_are_counted_right(earlytom, videos, tmp_path):
    file = tmp_path / "out.json"
    status, output, _ = compare(
        earlytom, videos, "--variants", "plus", "--retain-ratios", "1,0.1", "--no-reuse", "--json", file,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert status == 0
    content = json.loads(file.read_text())
    rows, (everything, tenth) = content["rows"], content["summary"]
    assert content["finished"] and len(rows) == 4 == everything["questions"]
    for row in rows:
        whole = row["settings"]["plus 100 %"]
        assert whole["agrees"] and whole["tokens"] == row["full"]["tokens"] and abs(whole["lost"]) < 1e-4
        assert row["full"]["video_tokens"] == whole["video_tokens"] == FRAMES * TOKENS
        cut = row["settings"]["plus 10 %"]
        assert cut["video_tokens"] == round(0.1 * FRAMES * TOKENS)
        assert cut["agrees"] == (cut["text"] == row["full"]["text"])
        assert cut["right"] == (cut["text"] == row["answer"])
        pairs = zip(row["full"]["log_probabilities"], cut["log_probabilities"], strict=True)
        assert cut["lost"] == pytest.approx(statistics.fmean(full - less for full, less in pairs))
        assert cut["seconds"] > 0 and row["full"]["seconds"] > 0
    assert everything["agree"] == 4 and everything["right"] == everything["full_right"]
    assert tenth["lost"] == pytest.approx(statistics.fmean(row["settings"]["plus 10 %"]["lost"] for row in rows))
    assert tenth["seconds"] == statistics.median(row["settings"]["plus 10 %"]["seconds"] for row in rows)
    assert "[4/4]" in output and "Nothing is compiled" in output and content["recommendation"] in output


def canned(question):
    """A row as the models would make it, for tests of what becomes of rows."""
    answer = {
        "text": "red", "tokens": [5], "log_probabilities": [-0.5], "seconds": 0.1, "video_tokens": 10, "right": True,
    }  # fmt: skip
    settings = {"plus 50 %": {**answer, "agrees": True, "lost": 0.0}}
    return {
        "video": question.video, "question": question.text, "answer": question.answer, "full": answer,
        "settings": settings,
    }  # fmt: skip


def test_a_stopped_run_goes_on(earlytom, videos, checkpoint, tmp_path, monkeypatch):
    file, answered = tmp_path / "out.json", []

    def ask_until(stop):
        def ask(self, question, *arguments):
            if len(answered) == stop:
                raise KeyboardInterrupt
            answered.append(question)
            return canned(question)

        monkeypatch.setattr("earlytom_compile.cli.compare.Asker._ask", ask)

    options = ("--variants", "plus", "--retain-ratios", "0.5", "--json", file)
    ask_until(2)
    status, _, errors = compare(earlytom, videos, *options, model=checkpoint)
    assert status == 130 and "2 of 4" in errors and "--resume" in errors
    before = json.loads(file.read_text())
    assert not before["finished"] and len(before["rows"]) == 2
    status, _, errors = compare(earlytom, videos, *options, "--resume", "--max-new-tokens", 3, model=checkpoint)
    assert status == 2 and "max_new_tokens=32, not 3" in errors
    ask_until(None)
    status, output, _ = compare(earlytom, videos, *options, "--resume", model=checkpoint)
    after = json.loads(file.read_text())
    assert status == 0 and after["finished"] and "[3/4]" in output and "[2/4]" not in output
    assert after["rows"][:2] == before["rows"] and len(after["rows"]) == 4
    assert len({(question.video, question.text) for question in answered}) == len(answered) == 4


def test_mistakes_are_told_before_anything_is_loaded(earlytom, videos, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("earlytom_compile.cli.loading.Checkpoint.load", load)
    other = tmp_path / "other.csv"
    other.write_text("video,question\nnone.mp4,What?\n")
    text, tagged = tmp_path / "text.csv", tmp_path / "tagged.csv"
    text.write_text("video,question\nquestions.csv,What?\n")
    tagged.write_text("video,question\n0.mp4,What is <video>?\n")
    for message, arguments in {
        "no such folder": ("--videos", tmp_path / "nowhere"),
        "cannot be read": ("--questions", tmp_path / "nowhere.csv"),
        "has no video 'none.mp4'": ("--questions", other),
        "retain_ratio=2.0": ("--retain-ratios", "2"),
        "one of 'paper', 'released', 'plus'": ("--variants", "paper,pluss"),
        "name a setting twice": ("--variants", "plus,plus"),
        "nothing can be written there": ("--json", videos / "0.mp4" / "out.json"),
        "resume: give --json": ("--resume",),
        "max_new_tokens=0": ("--max-new-tokens", 0),
        "fewer than the 500 asked for": ("--frames", 500),
        "is no video file": ("--questions", text),
        "stands for the video itself": ("--questions", tagged),
    }.items():
        status, _, errors = compare(earlytom, videos, *arguments)
        assert status == 2 and message in errors and "Traceback" not in errors, message


# --- Which setting to take ------------------------------------------------------------------------


@st.composite
def summaries(draw):
    questions = draw(st.integers(1, 50))
    truth = draw(st.booleans())
    full_right = draw(st.integers(0, questions)) if truth else None
    found = []
    for ratio in draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True)):
        found.append(
            Summary(
                Setting("plus", ratio), questions, draw(st.integers(0, questions)),
                draw(st.integers(0, questions)) if truth else None, full_right, draw(st.floats(-1, 5)),
                draw(st.sampled_from([10.0, 20.0, 30.0])), 100.0, draw(st.floats(0.01, 9)), draw(st.floats(0.01, 9)),
            )
        )  # fmt: skip
    return found


@given(summaries())
def test_the_recommended_setting_has_the_fewest_tokens_of_those_good_enough(found):
    best = recommended(found)
    text = recommendation(found)
    good = [one for one in found if one.kept >= KEPT]
    if best is None:
        assert not good and text.startswith("None of these keeps 95%") and "larger --retain-ratios" in text
        return
    assert best in good
    for other in good:
        assert best.tokens <= other.tokens
        if best.tokens == other.tokens:
            assert best.kept >= other.kept and (best.kept > other.kept or best.lost <= other.lost)
    assert text.startswith("Take variant='plus'") and f"{best.setting.retain_ratio:g}:" in text
    assert f"{best.agree} of {best.questions}" in text and f"{nats(best.lost, 3)} nats" in text
    assert ("say little" in text) == (best.questions < 30)


@examples(50)
@given(st.integers(1, 400), st.floats(0, 1))
def test_the_interval_is_wilsons(of, share):
    hits = round(share * of)
    expected = binomtest(hits, of).proportion_ci(method="wilson")
    assert interval(hits, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.floats(-1e3, 1e3))
def test_a_zero_has_no_minus(value):
    assert float(nats(value, 2)) == pytest.approx(value, abs=0.0051) and not nats(value, 2).startswith("-0.00")


# --- The file of questions ------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)
names = st.sampled_from(["a.mp4", "b c.mp4", "sub/d.mp4"])


@given(st.lists(st.tuples(names, texts, st.none() | texts), min_size=1, max_size=6), st.sampled_from(["csv", "json"]))
def test_both_formats_give_the_questions_back(tmp_path_factory, rows, layout):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for name in ("a.mp4", "b c.mp4", "sub/d.mp4"):
        (folder / name).touch()
    if layout == "csv":
        assume(all(not text.startswith("{") for _, text, _ in rows))
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerows([("video", "question", "answer"), *((v, q, a or "") for v, q, a in rows)])
        text = buffer.getvalue()
    else:
        text = "\n".join(json.dumps({"video": v, "question": q, **({"answer": a} if a else {})}) for v, q, a in rows)
    (folder / "questions").write_text(text, encoding="utf-8", newline="")
    found = read_questions(folder / "questions", folder)
    assert sorted(map(repr, ((q.video, q.text, q.answer) for q in found))) == sorted(map(repr, rows))
    order = [question.video for question in found]
    assert list(dict.fromkeys(order)) == list(dict.fromkeys(video for video, _, _ in rows))
    assert sum(a != b for a, b in zip(order, order[1:], strict=False)) == len(set(order)) - 1  # each in one piece
    assert all(question.path == folder / question.video for question in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("video,question\n", "has no question in it"),
        ("clip,prompt\na,b\n", "begins with 'clip,prompt'"),
        ("video,question\na.mp4,who, and where?\n", "line 2 has more than it may.*quotes"),
        ("video,question\na.mp4,\n", "line 2 has no question"),
        ('{"video": "a.mp4"}', "line 1 has no question"),
        ('{"video": "a.mp4", "question": "x", "anwser": "y"}', "anwser.*There are video, question, answer"),
        ('{"video": "a.mp4",\n', "line 1 is not JSON"),
    ],
)
def test_what_is_wrong_with_the_file_is_named(tmp_path, text, message):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "questions").write_text(text)
    with pytest.raises(EarlyTomConfigError, match=message):
        read_questions(tmp_path / "questions", tmp_path)


@pytest.mark.parametrize(
    ("truth", "said", "right"),
    [
        ("a chart", "A chart.", True), ("a chart", " a  CHART", True), ("a chart", "chart", False),
        ("B", "B", True), ("B", "b.", True), ("B", "(B) a chart", True), ("B", "B: a chart", True),
        ("B", "A. B", False), ("A", "A chart", False), ("5", "5", True), ("5", "5 things", False), (None, "x", None),
    ],
)  # fmt: skip
def test_right_answers(tmp_path, truth, said, right):
    assert Question("a.mp4", tmp_path, "What?", truth).is_right(said) is right


def test_half_as_likely_is_what_the_caption_says():
    assert nats(math.log(2), 1) == "0.7"
