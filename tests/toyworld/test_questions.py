"""Answers are what the pixels show, and the questions alone do not tell them."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from pixels import seen

from earlytom_compile.toyworld.questions import (
    CATEGORIES,
    NUMBERS,
    TRAINING_CATEGORIES,
    WAYS,
    Question,
    all_questions,
    ask,
    draw,
)
from earlytom_compile.toyworld.world import COLORS, SHAPES, SPEEDS, rng_of, sample_video

LOOKED_AT = 200
VIDEOS, MANY_VIDEOS = 1500, 6000  # asked about in `make test`, and in the long tests
TEMPLATES = (
    "what color is the", "what shape is the", "which way does", "how fast does", "how many things", "at first",
    "at last", "which comes first", "what color flashes", "what shape flashes", "in which column", "in which row",
)  # fmt: skip
CENTRE_WITHIN = 3.0  # pixels: that of a triangle is not where its pixels have theirs


@pytest.fixture(scope="module")
def videos():
    return [sample_video("test", seed) for seed in range(VIDEOS)]


@pytest.fixture(scope="module")
def looked_at(videos):
    """What is seen in each of the first videos, and all questions about it. Specks are no part of any answer."""
    bare = [replace(video, specks={}) for video in videos[:LOOKED_AT]]
    return [(seen(video.frames()), all_questions(video)) for video in bare]


# --- Right answers -------------------------------------------------------------------------------------


def answers_seen(text, things):
    """All words that answer a question as far as the pixels tell."""
    match text.split():
        case "what", "color", "is", "the", shape, "?":
            return {s.color for s in things if s.shape == shape}
        case "what", "shape", "is", "the", color, "thing", "?":
            return {s.shape for s in things if s.color == color}
        case "which", "way", "does", "the", color, shape, "go", "?":
            return {way_of(*velocity(color, shape, things))}
        case "how", "fast", "does", "the", color, shape, "go", "?":
            return {"slow" if max(map(abs, velocity(color, shape, things))) < 5.5 else "fast"}
        case "how", "many", "things", "are", "in", "the", *where, "?":
            frames = {"first scene": [0], "last scene": [7], "video": range(8)}[" ".join(where)]
            return {NUMBERS[sum(s.frame == frame for s in things) - 1] for frame in frames}
        case "what", "color", "has", "the", shape, "at", when, "?":
            frames = [s.frame for s in things if s.shape == shape]
            frame = min(frames) if when == "first" else max(frames)
            return {s.color for s in things if s.shape == shape and s.frame == frame}
        case "which", "comes", "first", ",", a, "or", b, "?":
            since = {color: min(s.frame for s in things if s.color == color) for color in (a, b)}
            return {color for color in since if since[color] == min(since.values())}
        case "what", ("color" | "shape") as what, "flashes", "?":
            return {getattr(s, what) for s in things if not any(continues(s, other) for other in things)}
        case "in", "which", line, "is", "the", color, shape, "at", "the", when, "?":
            s = track(color, shape, things)[0 if when == "start" else -1]
            centre = s.x if line == "column" else s.y
            return {NUMBERS[int((centre + d) // 24)] for d in (-CENTRE_WITHIN, CENTRE_WITHIN)}
    raise AssertionError(f"an unknown question: {text}")


def track(color, shape, things):
    """The one thing of this color and shape, frame by frame."""
    found = sorted((s for s in things if (s.color, s.shape) == (color, shape)), key=lambda s: s.frame)
    frames = [s.frame for s in found]
    assert frames == list(range(frames[0], frames[-1] + 1))
    return found


def velocity(color, shape, things):
    """Pixels a frame, to the right and down."""
    first, *_, last = track(color, shape, things)
    return (last.x - first.x) / (last.frame - first.frame), (last.y - first.y) / (last.frame - first.frame)


def continues(a, b):
    """Whether ``a`` may be ``b`` in the frame before or after: nothing goes faster than eight pixels a frame."""
    alike = (a.color, a.shape) == (b.color, b.shape) and abs(a.frame - b.frame) == 1
    return alike and max(abs(a.x - b.x), abs(a.y - b.y)) < 9


def way_of(right, down):
    if max(abs(right), abs(down)) < 1:
        return "nowhere"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_what_the_pixels_show(looked_at, template):
    asked, certain = 0, 0
    for seed, (things, questions) in enumerate(looked_at):
        for question in (question for question in questions if template in question.text):
            answers = answers_seen(question.text, things)
            asked += 1
            certain += len(answers) == 1
            assert question.answer in answers, (seed, question)
            assert len(answers) == 1 or question.category == "place", (seed, question, answers)
    assert certain > 20
    assert certain > 0.7 * asked


def test_every_question_is_of_a_known_template(looked_at):
    for _, questions in looked_at:
        for question in questions:
            assert sum(template in question.text for template in TEMPLATES) == 1, question.text


def test_no_question_of_a_video_has_two_answers(videos):
    asked = set()
    for seed, video in enumerate(videos):
        answers = defaultdict(set)
        for question in all_questions(video):
            answers[question.category, question.text].add(question.answer)
            asked.add(question.category)
        assert all(len(found) == 1 for found in answers.values()), (seed, answers)
    assert asked == set(TRAINING_CATEGORIES)


def test_answers_are_among_their_choices(looked_at):
    choices = {tuple(COLORS), SHAPES, WAYS, tuple(SPEEDS), NUMBERS}
    for question in (question for _, questions in looked_at for question in questions):
        assert question.choices.count(question.answer) == 1
        assert question.choices in choices or set(question.choices) < set(COLORS)
        assert question.category in TRAINING_CATEGORIES
        assert question.chance == 1 / len(set(question.choices))


def test_specks_change_no_question(videos):
    for video in videos[:50]:
        assert all_questions(video) == all_questions(replace(video, specks={}))


# --- Drawing -------------------------------------------------------------------------------------------


def test_ask_draws_one_question_of_each_category_there_is(videos):
    for seed, video in enumerate(videos[:100]):
        questions, asked = all_questions(video), ask(video, rng_of("test", seed, 3))
        assert list(asked) == [c for c in CATEGORIES if any(q.category == c for q in questions)]
        assert all(question in questions and question.category == c for c, question in asked.items())
        assert asked == ask(video, rng_of("test", seed, 3))


def test_choices_are_drawn_before_questions():
    numbers = [Question(f"how many {i}", "one", ("one", "two"), "counting") for i in range(9)]
    color = Question("which", "red", ("red", "blue"), "order")
    rng = np.random.default_rng(0)
    drawn = Counter(draw([*numbers, color], rng) for _ in range(2000))
    assert drawn[color] == pytest.approx(1000, abs=90)
    assert all(drawn[question] == pytest.approx(1000 / 9, abs=45) for question in numbers)


# --- Balance -------------------------------------------------------------------------------------------


def asked_about(split, videos):
    """One question of each category about each, by the number of the video."""
    return [q for seed, video in enumerate(videos) for q in ask(video, rng_of(split, seed, 3)).values()]


@pytest.fixture(scope="module")
def asked(videos):
    return asked_about("test", videos)


@pytest.fixture(scope="module", params=[VIDEOS, pytest.param(MANY_VIDEOS, marks=pytest.mark.long)])
def many_asked(request, videos, asked):
    """How many videos there are, and what is asked about them."""
    more = range(len(videos), request.param)
    late = [q for seed in more for q in ask(sample_video("test", seed), rng_of("test", seed, 3)).values()]
    return request.param, asked + late


@pytest.mark.parametrize(
    ("category", "choices"),
    [
        ("appearance", tuple(COLORS)),
        ("appearance", SHAPES),
        ("motion", WAYS),
        ("motion", tuple(SPEEDS)),
        ("counting", NUMBERS),
        ("order", tuple(COLORS)),
        ("needle", tuple(COLORS)),
        ("needle", SHAPES),
    ],
)
def test_answers_are_about_equally_frequent(many_asked, category, choices):
    videos, questions = many_asked
    answers = Counter(q.answer for q in questions if q.category == category and q.choices == choices)
    uniform = answers.total() / len(choices)
    assert uniform > 60 * videos / MANY_VIDEOS
    # Of n draws with chance 1/k, n/k plus or minus sqrt(n/k * (1 - 1/k)) are expected: in parts of n/k, sqrt((k-1)/n).
    # The limits are for many videos; with fewer, a word may be three of these outside.
    slack = 0 if videos == MANY_VIDEOS else 3 * ((len(choices) - 1) / answers.total()) ** 0.5
    for word in choices:
        # Where nothing moves there is no question about speed, so that the one about ways is asked instead.
        most = 1.45 if word == "nowhere" else 1.3
        assert 0.75 - slack < answers[word] / uniform < most + slack, answers


def test_neither_color_comes_first_more_often(many_asked):
    videos, questions = many_asked
    pairs = [q for q in questions if q.text.startswith("which comes first")]
    named_first = [q.text.split()[4] == q.answer for q in pairs]
    of_the_alphabet = [q.choices[0] == q.answer for q in pairs]
    assert len(pairs) > 1000 * videos / MANY_VIDEOS
    # 4.5 standard deviations of a mean of so many coins: 0.05 with the 2047 pairs of many videos.
    most = 4.5 * 0.5 / len(pairs) ** 0.5
    assert np.mean(named_first) == pytest.approx(0.5, abs=most)
    assert np.mean(of_the_alphabet) == pytest.approx(0.5, abs=most)


def test_knowing_the_question_is_worth_no_more_than_guessing(asked):
    learned = defaultdict(Counter)
    for question in asked_about("train", [sample_video("train", seed) for seed in range(VIDEOS)]):
        learned[question.text][question.answer] += 1
    right, chance = defaultdict(list), defaultdict(list)
    for question in asked:
        answers = learned.get(question.text) or Counter(question.choices)
        right[question.category].append(answers.most_common(1)[0][0] == question.answer)
        chance[question.category].append(question.chance)
    assert set(right) == set(CATEGORIES)
    for category in CATEGORIES:
        assert np.mean(right[category]) < np.mean(chance[category]) + 0.06, category
