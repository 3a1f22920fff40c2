"""Questions have one right answer, which follows from the story, and no answer that is right much more often."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from earlytom_compile.photoworld.language import IDS, build_tokenizer
from earlytom_compile.photoworld.questions import CATEGORIES, all_questions, ask
from earlytom_compile.photoworld.story import Shot, Story, Track, story_of
from earlytom_compile.photoworld.world import sample_video
from earlytom_compile.toyworld.world import COLORS, SHAPES, rng_of

VIDEOS = 700


@pytest.fixture(scope="module")
def asked():
    return [ask(sample_video("validation", seed), rng_of("validation", seed, 4)) for seed in range(VIDEOS)]


def track(pair, *places, glows=False):
    return Track(pair, 20.0, glows, places)


def answers(*shots):
    found = {}
    for question in all_questions(Story(shots)):
        assert found.setdefault(question.text, question.answer) == question.answer
    return found


def test_answers_follow_from_what_is_seen():
    ring = track(("red", "ring"), (40, 60), (40, 60), (40, 80), (40, 100))
    cross = track(("blue", "cross"), *[(200, 30)] * 4)
    flash = track(("green", "square"), None, None, (150, 150), None, glows=True)
    still = Shot(4, (track(("white", "circle"), *[(90, 140)] * 4), flash))
    said = answers(Shot(4, (ring, cross)), still)
    assert said["which way does the red ring go ?"] == "down"
    assert said["which way does the blue cross go ?"] == "nowhere"
    assert "which way does the white circle go ?" not in said  # all stands where something flashes
    assert said["how many things are in the first scene ?"] == "two"
    assert "how many things are in the last scene ?" not in said
    assert said["what color is the circle ?"] == "white"
    assert said["what shape is the red thing ?"] == "ring"
    assert "what color is the square ?" not in said
    assert said["what color flashes ?"] == "green" and said["what shape flashes ?"] == "square"
    assert said["which comes first , white or red ?"] == "red"
    assert said["in which column is the blue cross ?"] == "four" and said["in which row is the blue cross ?"] == "one"
    assert said["in which column does the green square flash ?"] == "three"
    assert "in which column is the red ring ?" not in said
    assert said["in which quarter does the green square flash ?"] == "four"


def flashing(pair, length, *frames):
    return track(pair, *[(150, 100) if frame in frames else None for frame in range(length)], glows=True)


def test_flashes_are_counted_and_ordered():
    stands = track(("white", "circle"), *[(30, 30)] * 12)
    said = answers(Shot(12, (stands, flashing(("red", "ring"), 12, 1, 5, 9))))
    assert said["how many times does the red ring flash ?"] == "three"
    assert "in which quarter does the red ring flash ?" not in said and "what color flashes ?" not in said
    both = answers(Shot(12, (stands, flashing(("red", "ring"), 12, 8), flashing(("blue", "cross"), 12, 2))))
    assert both["which flashes first , red or blue ?"] == both["which flashes first , blue or red ?"] == "blue"
    assert "how many times does the red ring flash ?" not in both
    long = answers(Shot(12, (stands, flashing(("red", "ring"), 12, 4, 5))))
    assert "how many times does the red ring flash ?" not in long
    assert long["in which quarter does the red ring flash ?"] == "two"


def test_what_comes_is_asked_about_and_what_leaves_is_not():
    stands = track(("white", "circle"), *[(30, 30)] * 8)
    comes = track(("red", "ring"), *[None] * 5, *[(100, 100)] * 3)
    said = answers(Shot(8, (stands, comes)))
    assert said["in which quarter does the red ring appear ?"] == "three"
    assert "how many things are in the video ?" not in said
    backwards = Shot(8, (stands, comes)).picked(range(7, -1, -1))
    assert "in which quarter does the red ring appear ?" not in answers(backwards)


def test_a_backward_shot_has_the_backward_answers():
    shot = Shot(4, (track(("red", "ring"), (40, 60), (70, 60), (100, 60), (130, 60)),))
    assert answers(shot)["which way does the red ring go ?"] == "right"
    assert answers(shot.picked([3, 2, 1, 0]))["which way does the red ring go ?"] == "left"


def test_words_are_known(asked):
    tokenizer = build_tokenizer()
    for questions in asked[:100]:
        for question in questions.values():
            assert question.answer in question.choices
            assert {*question.text.split(), *question.choices} <= set(IDS)
            assert tokenizer(question.text)["input_ids"] == [IDS[word] for word in question.text.split()]


def test_every_category_is_asked_often(asked):
    count = Counter(category for questions in asked for category in questions)
    assert set(count) == set(CATEGORIES)
    assert min(count.values()) > VIDEOS / 12


def test_right_answers_are_balanced(asked):
    names = re.compile("|".join(rf"\b{word}\b" for word in (*COLORS, *SHAPES)))
    said = defaultdict(list)
    for questions in asked:
        for question in questions.values():
            said[question.category, names.sub("X", question.text), len(question.choices)].append(question)
    for questions in said.values():
        if len(questions) < 80 or "first ," in questions[0].text:
            continue
        share = max(Counter(question.answer for question in questions).values()) / len(questions)
        noise = 3 * np.sqrt(questions[0].chance / len(questions))
        assert share < 1.25 * questions[0].chance + noise, questions[0].text


def test_the_color_named_first_comes_first_as_often_as_not():
    first = []
    for seed in range(VIDEOS):
        for question in all_questions(story_of(sample_video("validation", seed))):
            if question.category == "order":
                first.append(question.text.split()[4] == question.answer)
    assert np.mean(first) == 0.5  # both ways round are asked
