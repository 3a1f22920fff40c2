"""Labels are what the pixels show, and rows are the prompts of their questions laid end to end."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from pixels import glows, seen

from earlytom_compile.toyworld.batches import IGNORED, cells, patch_batch, question_batch, rows_of
from earlytom_compile.toyworld.language import build_tokenizer, prompt
from earlytom_compile.toyworld.questions import TRAINING_CATEGORIES, all_questions
from earlytom_compile.toyworld.world import COLORS, FRAMES, SHAPES, sample_video

EQUAL = dict.fromkeys(TRAINING_CATEGORIES, 1.0)
LEAST_PIXELS = 17


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def tensors_of(record):
    """All of them but those of ``rows``, however deep."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif field.name != "rows":
            yield from tensors_of(value)


# --- Patches -------------------------------------------------------------------------------------------


def pixels_in_cells(mask, side):
    """[cells]: pixels of ``mask`` in each square of ``side`` pixels, row by row."""
    places = range(0, 96, side)
    return np.array([[mask[y : y + side, x : x + side].sum() for x in places] for y in places]).ravel()


@pytest.mark.parametrize("grid", [8, 4])
@pytest.mark.parametrize("seed", range(12))
def test_cells_are_labelled_with_what_covers_most_of_them(seed, grid):
    video, side = replace(sample_video("test", seed), specks={}), 96 // grid
    for time in (0, 3, 7):
        things = seen(video.draw(time)[None])
        covered = np.stack([pixels_in_cells(s.mask, side) for s in things])
        color, shape, flashes, offset = cells(video, time, grid)
        assert color.shape == shape.shape == (grid**2,)
        for cell in range(grid**2):
            best = covered[:, cell].argmax()
            there = covered[best, cell] > LEAST_PIXELS
            if there and (covered[:, cell] == covered[best, cell]).sum() > 1:
                continue  # as much of one thing as of another
            thing = things[best]
            assert color[cell] == (1 + list(COLORS).index(thing.color) if there else 0)
            assert shape[cell] == (1 + SHAPES.index(thing.shape) if there else 0)
            assert flashes[cell] == (there and glows(video.draw(time), thing.mask))
            if not there:
                assert (offset[cell] == 0).all()
            elif thing.shape == "circle":
                middle = np.array([cell % grid, cell // grid]) * side + (side - 1) / 2
                np.testing.assert_allclose(middle + side * offset[cell], (thing.x, thing.y), atol=1.0)


def test_patch_batch_holds_frames_of_each_video_and_their_labels():
    batch = patch_batch(range(5), "test", frames_of_each=3)
    assert batch.frames.shape == (15, 96, 96, 3) and batch.frames.dtype == torch.uint8
    for seed in range(5):
        video = sample_video("test", seed)
        pictures = video.frames()
        times = []
        for row in range(3 * seed, 3 * seed + 3):
            shown = [t for t in range(FRAMES) if np.array_equal(pictures[t], batch.frames[row])]
            for labels, grid in ((batch.patches, 8), (batch.tokens, 4)):
                of_row = (labels.color[row], labels.shape[row], labels.flashes[row], labels.offset[row])
                shown = [t for t in shown if all(map(np.array_equal, of_row, cells(video, t, grid)))]
            assert shown, (seed, row)
            times.append(shown)
        assert len({t for shown in times for t in shown}) >= 3  # three different times


def test_same_seeds_same_patches():
    assert same(patch_batch(range(4)), patch_batch(range(4)))
    assert not same(patch_batch(range(4)), patch_batch(range(1, 5)))
    assert not same(patch_batch(range(4)), patch_batch(range(4), "validation"))


# --- Videos --------------------------------------------------------------------------------------------


def test_index_puts_the_frames_of_each_video_together():
    batch = question_batch(range(8), EQUAL, 2, "test")
    for seed in range(8):
        np.testing.assert_array_equal(batch.frames[batch.index[seed]], sample_video("test", seed).frames())
        mine = batch.frames[batch.index[seed].unique()]
        assert len(mine.flatten(1).unique(dim=0)) == len(mine)
    assert batch.index.unique().tolist() == list(range(len(batch.frames)))
    assert len(batch.frames) < 8 * FRAMES  # some of these videos show a frame twice


def test_same_seeds_same_questions():
    batch, again = question_batch(range(6), EQUAL, 5), question_batch(range(6), EQUAL, 5)
    assert same(batch, again) and same(batch.rows, again.rows)
    assert not same(batch, question_batch(range(6), EQUAL, 5, "validation"))


def texts_of(row):
    """question -> its words, out of one row of a batch."""
    tokenizer = build_tokenizer()
    numbers = [number for number in row.question.unique().tolist() if number >= 0]
    words = [tokenizer.decode(row.ids[row.question == number]) for number in numbers]
    return [text.split(" <|im_end|> <|im_start|> assistant ") for text in words]


def row_of(rows, index):
    return type(rows)(*(getattr(rows, field.name)[index] for field in fields(rows)))


@pytest.mark.parametrize("count", [1, 4, 1000])
def test_at_most_so_many_questions_of_a_video(count):
    rows = question_batch(range(10), EQUAL, count, "test").rows
    for seed in range(10):
        there = sorted([q.text, q.answer] for q in all_questions(sample_video("test", seed)))
        asked = sorted(texts_of(row_of(rows, seed)))
        assert len(asked) == min(count, len(there))
        assert asked == there if count == 1000 else all(asked.count(a) <= there.count(a) for a in asked)


@pytest.mark.parametrize("category", TRAINING_CATEGORIES)
def test_a_category_without_weight_is_left_out(category):
    rows = question_batch(range(20), {**EQUAL, category: 0.0}, 1000, "test").rows
    asked = {TRAINING_CATEGORIES[i] for i in rows.category[rows.question >= 0].unique()}
    assert asked == set(TRAINING_CATEGORIES) - {category}


@pytest.mark.parametrize("videos", [160, pytest.param(400, marks=pytest.mark.long)])
def test_categories_are_drawn_by_weight(videos):
    rows = question_batch(range(videos), {"counting": 3.0, "place": 1.0}, 1, "test").rows
    both = [
        seed
        for seed in range(videos)
        if {"counting", "place"} <= {q.category for q in all_questions(sample_video("test", seed))}
    ]
    counting = rows.category[both, 0] == TRAINING_CATEGORIES.index("counting")
    assert len(both) > videos / 2
    # 2.6 standard deviations of the mean of draws that are three to one: less than 0.08 with 400 videos.
    assert counting.float().mean().item() == pytest.approx(0.75, abs=2.6 * (0.75 * 0.25 / len(both)) ** 0.5)


# --- Rows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    return [all_questions(sample_video("test", seed))[:count] for seed, count in ((0, 5), (1, 1), (2, 3))]


def test_rows_are_the_prompts_behind_the_video(asked):
    tokenizer, rows = build_tokenizer(), rows_of(asked)
    video = tokenizer.convert_tokens_to_ids("<video>")
    for index, questions in enumerate(asked):
        row = row_of(rows, index)
        for number, question in enumerate(questions):
            said = tokenizer(f"{prompt(question.text)} {question.answer} <|im_end|>").input_ids
            said = said[said.index(video) + 1 :]
            here = row.question == number
            assert row.ids[here].tolist() == said[:-1]
            assert row.position[here].tolist() == list(range(len(said) - 1))
            assert row.category[here].unique().tolist() == [TRAINING_CATEGORIES.index(question.category)]
            # A label is the token that comes next; only the answer and its end have one.
            assert row.labels[here].tolist() == [IGNORED] * (len(said) - 3) + said[-2:]


def test_questions_stand_one_behind_the_other_and_padding_is_ignored(asked):
    rows = rows_of(asked)
    for index, questions in enumerate(asked):
        row = row_of(rows, index)
        length = int((row.question >= 0).sum())
        numbers = row.question[:length].tolist()
        assert numbers == sorted(numbers) and set(numbers) == set(range(len(questions)))
        assert (row.question[length:] == -1).all() and (row.labels[length:] == IGNORED).all()
    assert (rows.question >= 0).any(0).all()  # no longer than the longest
    assert all(getattr(rows, f.name).dtype == torch.int64 for f in fields(rows))


def test_a_row_may_have_no_question(asked):
    rows = rows_of([asked[0], []])
    assert (rows.question[1] == -1).all() and (rows.labels[1] == IGNORED).all()


def test_batches_move_with_all_they_hold():
    batch = question_batch(range(2), EQUAL, 2).to(torch.device("meta"))
    assert {batch.frames.device, batch.index.device, batch.rows.ids.device, batch.rows.labels.device} == {
        torch.device("meta")
    }
