"""Options: what is allowed, what the defaults become, and Table 8."""

import numpy as np
import pytest

from earlytom_compile import EarlyTomConfig, EarlyTomConfigError
from earlytom_compile.config import PRESETS


@pytest.mark.parametrize(
    "options",
    [
        {"retain_ratio": 0},
        {"retain_ratio": True},
        {"retain_ratio": float("nan")},
        {"variant": "Paper"},
        {"variant": "plus "},
        {"merge_layers": "6"},
        {"merge_layers": (6, 6)},
        {"merge_layers": (-1,)},
        {"tau_seg": "high"},
        {"alpha": 0},
        {"max_window": 1},
        {"tau_merge": "frame"},
        {"lowering": "fast"},
        {"mode": "fast"},
        {"static_selection": "gpu"},
        {"inner_layer": 18},
        {"inner_drop_ratio": 1.0},
        {"inner_drop_ratio": 0.3},
        {"strict": 1},
        {"preset": "imagenet"},
        {"preset": "videomme", "retain_ratio": 0.3},
    ],
)
def test_bad_values_name_the_option_and_what_is_allowed(options):
    name = next(iter(options))
    with pytest.raises(EarlyTomConfigError, match=name):
        EarlyTomConfig.from_options(options)


def test_unknown_option_lists_the_valid_ones():
    with pytest.raises(EarlyTomConfigError, match="unknown option 'tau'.*Valid options: retain_ratio, variant"):
        EarlyTomConfig.from_options({"tau": 0.1})


def test_numpy_numbers_are_numbers():
    config = EarlyTomConfig(retain_ratio=np.float32(0.25), merge_layers=np.array([3, 1]), max_window=np.int64(4))
    assert config.merge_layers == (1, 3) and config.token_budget(8, 4) == 8


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, ()), (2, (0,)), (12, (2, 9, 10)), (26, (6, 21, 23)), (27, (6, 21, 23)), (52, (13, 43, 47))],
)
def test_default_merge_layers(layers, expected):
    assert EarlyTomConfig().resolve_merge_layers(layers) == expected


@pytest.mark.parametrize("layers", range(1, 60))
def test_default_merge_layers_are_distinct_and_before_the_last(layers):
    chosen = EarlyTomConfig().resolve_merge_layers(layers)
    assert list(chosen) == sorted(set(chosen)) and all(0 <= layer < layers - 1 for layer in chosen)


def test_presets_are_table_8_and_explicit_options_win():
    by_hand = EarlyTomConfig(tau_seg=0.3, merge_layers=(10, 21, 23), retain_ratio=0.1, preset="videomme")
    assert EarlyTomConfig(preset="videomme", retain_ratio=0.1) == by_hand
    assert EarlyTomConfig.from_options({"preset": "videomme", "retain_ratio": 0.1}) == by_hand
    mixed = EarlyTomConfig.from_options({"preset": "mvbench", "retain_ratio": 0.1, "tau_seg": 0.6})
    assert (mixed.tau_seg, mixed.merge_layers) == (0.6, (8, 14, 20))
    assert EarlyTomConfig.from_options({"preset": "mvbench-0.5b"}).merge_layers == (8, 21, 23)


def test_options_that_do_nothing_yet_are_not_offered():
    with pytest.raises(EarlyTomConfigError) as refused:
        EarlyTomConfig.from_options({"inner_drop": 0.1})
    assert "inner" not in str(refused.value).replace("'inner_drop'", "")
    assert EarlyTomConfig.from_options({"inner_layer": None, "inner_drop_ratio": 0.5}) == EarlyTomConfig()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layers", [1, 2, 8, 12, 26, 27, 52])
def test_presets_move_their_layers_to_the_same_share_of_the_depth(preset, layers):
    config = EarlyTomConfig(preset=preset, retain_ratio=0.1)
    chosen = config.resolve_merge_layers(layers)
    assert chosen == EarlyTomConfig.from_options({"preset": preset, "retain_ratio": 0.1}).resolve_merge_layers(layers)
    if layers in (26, 27):
        assert chosen == config.merge_layers
        return
    assert list(chosen) == sorted(set(chosen)) and all(0 <= layer < layers - 1 for layer in chosen)
    # No layer is further from its share than rounding, or the last place where merging helps, makes it.
    for layer in config.merge_layers:
        share = (layer + 1) / 26 * layers
        assert layers == 1 or min(abs(min(max(share, 1), layers - 1) - (there + 1)) for there in chosen) <= 0.5


def test_the_callers_own_layers_are_never_moved():
    given = {"preset": "videomme", "retain_ratio": 0.1, "merge_layers": (10, 21, 23)}  # those of the preset, even
    for config in (EarlyTomConfig.from_options(given), EarlyTomConfig(**given)):
        assert config.resolve_merge_layers(30) == (10, 21, 23)
        with pytest.raises(EarlyTomConfigError, match="layer 10 does not exist"):
            config.resolve_merge_layers(8)


def test_budget_and_floor():
    config = EarlyTomConfig(retain_ratio=0.1)
    assert config.token_budget(32, 196) == 627 and config.min_frames(32) == 4
    assert EarlyTomConfig(retain_ratio=0.001).token_budget(1, 9) == 1
    assert EarlyTomConfig(variant="released").min_frames(32) == 1
    assert EarlyTomConfig(variant="plus", retain_ratio=0.1).min_frames(32) == 4
    assert EarlyTomConfig(variant="released").window() == 8 and EarlyTomConfig().window() == 0
    assert EarlyTomConfig().similarity_band(32) == 31 and EarlyTomConfig(max_window=4).similarity_band(32) == 3


@pytest.mark.parametrize(
    ("variant", "merges_as", "exactly", "by_attention"),
    [("paper", "paper", True, True), ("released", "released", False, True), ("plus", "paper", True, False)],
)
def test_what_a_variant_means(variant, merges_as, exactly, by_attention):
    config = EarlyTomConfig(variant=variant)
    assert config.merge_variant() == merges_as
    assert (config.keeps_exactly(), config.selects_by_attention()) == (exactly, by_attention)
    assert config.window() == EarlyTomConfig(variant=merges_as).window()
