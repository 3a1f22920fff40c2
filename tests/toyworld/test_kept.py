"""What the kept tokens show is what the pixels show."""

from dataclasses import replace

import pytest
import torch
from pixels import seen

from earlytom_compile.toyworld.kept import kept_tokens, main, shown
from earlytom_compile.toyworld.model import build_model
from earlytom_compile.toyworld.world import COLORS, SHAPES, sample_video


@pytest.mark.parametrize("seed", range(4))
def test_a_square_shows_a_pair_that_lies_in_it(seed):
    video = replace(sample_video("test", seed), specks={})
    pairs = shown(video)
    assert pairs.shape == (8, 16)
    for thing in seen(video.frames()):
        pair = 10 * (1 + list(COLORS).index(thing.color)) + 1 + SHAPES.index(thing.shape)
        squares = (pairs[thing.frame] == pair).nonzero().flatten().tolist()
        assert squares
        for square in squares:
            row, column = square // 4 * 24, square % 4 * 24
            assert thing.mask[row : row + 24, column : column + 24].any()


@torch.no_grad()
def test_all_tokens_keep_every_pair_and_a_ratio_of_one_keeps_all_tokens():
    model = build_model(seed=2)
    found = kept_tokens(model, sample_video("test", 3), retain_ratio=1.0)
    assert found["all tokens"][1]
    assert found["paper"] == found["plus"] == found["all tokens"]


def test_the_command_prints_a_row_for_each_selection(capsys):
    main(["--videos", "2"])
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["all tokens", "paper", "plus"]
    assert rows[0][2].strip() == "100.0%"
