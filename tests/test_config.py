"""Options: what is allowed, what the defaults become, and Table 8."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfig, EarlyTomConfigError
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Method, Step
from earlytom_compile.methods.registry import register_method
from earlytom_compile.presets import PRESETS


@pytest.mark.parametrize(
    "options",
    [
        {"retain_ratio": 0},
        {"retain_ratio": True},
        {"retain_ratio": float("nan")},
        {"retain_ratio": 10**400},
        {"tau_seg": 10**400},
        {"variant": "Paper"},
        {"variant": "plus "},
        {"merge_layers": "6"},
        {"merge_layers": (6, 6)},
        {"merge_layers": (-1,)},
        {"reuse": 1},
        {"reuse": "on"},
        {"tau_reuse": -0.01, "reuse": True},
        {"tau_reuse": float("inf"), "reuse": True},
        {"tau_reuse": float("nan"), "reuse": True},
        {"tau_reuse": True, "reuse": True},
        {"tau_reuse": "0.1", "reuse": True},
        {"full_layers": 3, "reuse": True},
        {"full_layers": "3", "reuse": True},
        {"full_layers": (3, 3), "reuse": True},
        {"full_layers": (-1,), "reuse": True},
        {"full_layers": (1.5,), "reuse": True},
        {"encode_ratio": 0, "reuse": True},
        {"encode_ratio": 1.01, "reuse": True},
        {"encode_ratio": float("nan"), "reuse": True},
        {"encode_ratio": True, "reuse": True},
        {"tau_seg": "high"},
        {"alpha": 0},
        {"max_window": 1},
        {"tau_merge": "frame"},
        {"lowering": "fast"},
        {"mode": "fast"},
        {"static_selection": "gpu"},
        {"inner_layer": 0},
        {"inner_layer": True},
        {"inner_layer": 2.0},
        {"inner_drop_ratio": 1.0, "inner_layer": 18},
        {"inner_drop_ratio": "half", "inner_layer": 18},
        {"method": "visonzip"},
        {"strict": 1},
        {"preset": "imagenet"},
        {"preset": "videomme", "retain_ratio": 0.3},
    ],
)
def test_bad_values_name_the_option_and_what_is_allowed(options):
    name, value = next(iter(options.items()))
    with pytest.raises(EarlyTomConfigError, match=rf"^{name}={re.escape(repr(value))}.*(must be|rows for)"):
        EarlyTomConfig.from_options(options)


def test_unknown_option_lists_the_valid_ones():
    with pytest.raises(EarlyTomConfigError, match="unknown option 'tau'.*Valid options: retain_ratio, variant"):
        EarlyTomConfig.from_options({"tau": 0.1})


def test_numpy_numbers_are_numbers():
    numbers = {"retain_ratio": np.float32(0.25), "merge_layers": np.array([3, 1]), "max_window": np.int64(4)}
    config = EarlyTomConfig(variant="paper", **numbers)
    assert config.merge_layers == (1, 3) and config.token_budget(8, 4) == 8


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, ()), (2, (0,)), (12, (2, 9, 10)), (26, (6, 21, 23)), (27, (6, 21, 23)), (52, (13, 43, 47))],
)
def test_default_merge_layers(layers, expected):
    assert EarlyTomConfig(variant="paper").resolve_merge_layers(layers) == expected
    assert EarlyTomConfig(reuse=False).resolve_merge_layers(layers) == expected
    assert EarlyTomConfig().resolve_merge_layers(layers) == (), "patches are reused instead"


@pytest.mark.parametrize("layers", range(1, 60))
def test_default_merge_layers_are_distinct_and_before_the_last(layers):
    chosen = EarlyTomConfig(variant="paper").resolve_merge_layers(layers)
    assert list(chosen) == sorted(set(chosen)) and all(0 <= layer < layers - 1 for layer in chosen)


def test_presets_are_table_8_and_explicit_options_win():
    by_hand = EarlyTomConfig(tau_seg=0.3, merge_layers=(10, 21, 23), retain_ratio=0.1, preset="videomme")
    assert EarlyTomConfig(preset="videomme", retain_ratio=0.1) == by_hand
    assert EarlyTomConfig.from_options({"preset": "videomme", "retain_ratio": 0.1}) == by_hand
    mixed = EarlyTomConfig.from_options({"preset": "mvbench", "retain_ratio": 0.1, "tau_seg": 0.6})
    assert (mixed.tau_seg, mixed.merge_layers) == (0.6, (8, 14, 20))
    assert EarlyTomConfig.from_options({"preset": "mvbench-0.5b"}).merge_layers == (8, 21, 23)


def test_inner_options_name_their_layer_and_need_it():
    assert EarlyTomConfig(inner_layer=18).steps_inside(28) == (Step(18, 0.5, "mean"),)
    released = EarlyTomConfig(variant="released", inner_layer=3, inner_drop_ratio=0.25)
    assert released.steps_inside(4) == (Step(3, 0.75, "sequential"),)
    assert EarlyTomConfig().steps_inside(28) == ()
    with pytest.raises(EarlyTomConfigError, match="inner_layer=18: the language model has layers 0 to 17"):
        EarlyTomConfig(inner_layer=18).steps_inside(18)
    with pytest.raises(EarlyTomConfigError, match="inner_drop_ratio=0.3 without inner_layer"):
        EarlyTomConfig(inner_drop_ratio=0.3)


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
    assert EarlyTomConfig(variant="released").window() == 8 and EarlyTomConfig().window() == 128
    assert (
        EarlyTomConfig().similarity_band(32) == 31
        and EarlyTomConfig(reuse=False, max_window=4).similarity_band(32) == 3
    )
    assert [EarlyTomConfig().similarity_band(frames) for frames in (1, 2, 128, 129, 768)] == [1, 1, 127, 127, 127]


@pytest.mark.parametrize(
    ("variant", "merges_as", "exactly", "by_attention"),
    [("paper", "paper", True, True), ("released", "released", False, True), ("plus", "paper", True, False)],
)
def test_what_a_variant_means(variant, merges_as, exactly, by_attention):
    config = EarlyTomConfig(variant=variant)
    assert config.merge_variant() == merges_as
    assert (config.keeps_exactly(), config.selects_by_attention()) == (exactly, by_attention)
    assert config.window() == EarlyTomConfig(variant=merges_as).window()


# --- The default -----------------------------------------------------------------------------------


def both_ways(options):
    """The config of ``options`` by both ways to make one."""
    return EarlyTomConfig.from_options(options), EarlyTomConfig(**options)


@pytest.mark.parametrize("options", [{}, {"variant": None}, {"retain_ratio": 0.1}, {"lowering": "eager", "mode": None}])
def test_plus_is_the_default(options):
    for config in both_ways(options):
        assert config.variant == "plus" and config.reuses() and config.keeps_exactly()
        assert not config.selects_by_attention() and config.resolve_full_layers(26) == (23, 24, 25)
        assert config == EarlyTomConfig.from_options({**options, "variant": "plus"})
        assert dataclasses.replace(config) == config


@pytest.mark.parametrize("more", [{}, {"reuse": True}, {"tau_seg": 0.5}, {"merge_layers": (3,)}])
def test_a_preset_is_of_the_paper(more):
    preset = {"preset": "videomme", "retain_ratio": 0.1, **more}
    assert EarlyTomConfig.from_options(preset) == EarlyTomConfig.from_options({**preset, "variant": "paper"})
    assert EarlyTomConfig(**preset) == EarlyTomConfig(**preset, variant="paper")
    for config in both_ways(preset):
        assert (
            config.variant == "paper" and config.selects_by_attention() and config.reuses() is bool(more.get("reuse"))
        )
    for variant in ("released", "plus"):
        for config in both_ways({"preset": "videomme", "retain_ratio": 0.1, "variant": variant}):
            assert config.variant == variant and config.reuses() is (variant == "plus")


@pytest.mark.parametrize("method", ["visionzip", "fastv", "holitom"])
def test_other_methods_have_no_variant_and_reuse_nothing_unless_asked(method):
    for config in both_ways({"method": method}):
        assert config.variant is None and not config.reuses() and config.keeps_exactly()
        assert dataclasses.replace(config, lowering="eager").method == method
        assert EarlyTomConfig(**dataclasses.asdict(config)) == config
    assert all(config.reuses() for config in both_ways({"method": method, "reuse": True}))


@pytest.mark.parametrize(
    "option", [{"tau_seg": 0.4}, {"alpha": 0.5}, {"max_window": 4}, {"tau_merge": 0.8}, {"merge_layers": (1, 2)}]
)
def test_who_never_chose_a_variant_is_told_of_the_papers(option):
    ((name, value),) = option.items()
    given = re.escape(f"{name}={value!r}")
    for make in (EarlyTomConfig.from_options, lambda options: EarlyTomConfig(**options)):
        says = f'^{given} with variant="plus", the default, which reuses patches: no frames merge'
        says += '.*variant="paper".*reuse=False'
        with pytest.raises(EarlyTomConfigError, match=says):
            make(option)
        assert getattr(make({"variant": "paper", **option}), name) == value
        assert make({"reuse": False, **option}).variant == "plus"
        with pytest.raises(EarlyTomConfigError, match=f"^{given} with reuse=True: no frames merge.*reuse=False"):
            make({"reuse": True, **option})
        if name != "tau_merge":  # with which nothing merges under "paper", either
            with pytest.raises(EarlyTomConfigError, match='the default, variant="plus", .* say variant="paper"'):
                make({"reuse": True, **option})
            assert make({"reuse": True, "variant": "paper", **option}).reuses()


def test_the_default_selects_on_the_device():
    for reuse in (None, False):
        with pytest.raises(EarlyTomConfigError, match='^static_selection=.*"plus", the default.*say variant="paper"'):
            EarlyTomConfig(static_selection="host", reuse=reuse)
    assert EarlyTomConfig(static_selection="host", variant="paper").static_selection == "host"


def test_options_of_reuse_with_a_preset_are_told_why_it_is_off():
    preset = {"preset": "videomme", "retain_ratio": 0.1}
    message = (
        "^tau_reuse=0.1 without reuse, which is off with preset='videomme', which is for variant='paper',.*reuse=True"
    )
    with pytest.raises(EarlyTomConfigError, match=message):
        EarlyTomConfig.from_options({**preset, "tau_reuse": 0.1})
    assert EarlyTomConfig.from_options({**preset, "tau_reuse": 0.1, "reuse": True}).variant == "paper"
    with pytest.raises(EarlyTomConfigError, match="^tau_reuse=0.1 without reuse, which is off with reuse=False"):
        EarlyTomConfig(reuse=False, tau_reuse=0.1)


# --- Reuse of unchanged patches -------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
@pytest.mark.parametrize("reuse", [None, True, False])
def test_who_reuses_patches_merges_no_frames(variant, reuse):
    config = EarlyTomConfig(variant=variant, reuse=reuse)
    assert config.reuses() == (variant == "plus" if reuse is None else reuse)
    assert config.resolve_merge_layers(26) == (() if config.reuses() else (6, 21, 23))
    assert config.scored_layer(26) == 23, "whether frames merge there or not"
    assert EarlyTomConfig.from_options({"variant": variant, "reuse": reuse}) == config


@pytest.mark.parametrize(
    "option", [{"tau_reuse": 0.1}, {"full_layers": ()}, {"full_layers": (1,)}, {"encode_ratio": 1}]
)
@pytest.mark.parametrize(
    "given",
    [{"variant": "paper"}, {"variant": "released"}, {"variant": "plus", "reuse": False}, {"reuse": False}],
)
def test_options_of_reuse_without_it_are_refused(given, option):
    ((name, value),) = option.items()
    for make in (EarlyTomConfig.from_options, lambda options: EarlyTomConfig(**options)):
        with pytest.raises(EarlyTomConfigError, match=rf"{name}={re.escape(repr(value))} without reuse.*reuse=True"):
            make({**given, **option})
        assert make({**given, "reuse": True, **option}).reuses()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"variant": "plus", "merge_layers": (1, 2)}, r'merge_layers=\(1, 2\) with variant="plus", which'),
        ({"variant": "plus", "reuse": True, "merge_layers": ()}, r"merge_layers=\(\) with reuse=True"),
        ({"variant": "plus", "tau_merge": 0.5}, r'tau_merge=0.5 with variant="plus"'),
        ({"variant": "paper", "reuse": True, "tau_merge": 0.5}, "tau_merge=0.5 with reuse=True"),
        ({"variant": "released", "reuse": True, "tau_merge": 0.5}, "tau_merge=0.5 with reuse=True"),
        ({"variant": "plus", "preset": "videomme", "merge_layers": (1, 2)}, r"merge_layers=\(1, 2\)"),
    ],
)
def test_options_of_merging_with_reuse_are_refused(given, says):
    for make in (EarlyTomConfig.from_options, lambda options: EarlyTomConfig(**options)):
        with pytest.raises(EarlyTomConfigError, match=f"{says}.*no frames merge.*reuse=False"):
            make(given)
        assert not make({**given, "reuse": False}).reuses()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_selection_by_attention_keeps_its_layer_and_its_segments(variant):
    config = EarlyTomConfig(variant=variant, reuse=True, merge_layers=(2, 5), tau_seg=0.4, alpha=0.5, max_window=6)
    assert config.scored_layer(8) == 5 and config.resolve_merge_layers(8) == ()
    with pytest.raises(EarlyTomConfigError, match="layer 5 does not exist"):
        config.require_layers(5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, (0,)), (2, (1,)), (3, (2,)), (4, (2, 3)), (5, (3, 4)), (6, (3, 4, 5)), (8, (5, 6, 7)), (12, (9, 10, 11)),
        (26, (23, 24, 25)), (27, (24, 25, 26)),
    ],
)  # fmt: skip
def test_layers_in_full_by_default(layers, expected):
    assert EarlyTomConfig(variant="plus").resolve_full_layers(layers) == expected


@pytest.mark.parametrize("layers", range(1, 60))
def test_layers_in_full_by_default_are_the_last_and_at_most_half(layers):
    full = EarlyTomConfig(variant="plus").resolve_full_layers(layers)
    assert full == tuple(range(layers - len(full), layers)) and 1 <= len(full) <= 3
    assert layers == 1 or 2 * len(full) <= layers


@pytest.mark.parametrize(
    ("given", "expected"), [((), ()), ((4, 0), (0, 4)), ([3], (3,)), (np.array([2, 1]), (1, 2)), (range(3), (0, 1, 2))]
)
def test_layers_in_full_as_they_are_given(given, expected):
    config = EarlyTomConfig.from_options({"variant": "plus", "full_layers": given})
    assert config.resolve_full_layers(5) == expected == config.full_layers


def test_layers_in_full_that_do_not_exist():
    config = EarlyTomConfig(variant="plus", full_layers=(1, 8))
    for look in (config.resolve_full_layers, config.require_layers):
        with pytest.raises(EarlyTomConfigError, match=r"full_layers=\(1, 8\): layer 8 does not exist.*0 to 7.*None"):
            look(8)
    config.require_layers(9)


@pytest.mark.parametrize(
    ("encode_ratio", "frames", "places", "prefix", "expected"),
    [
        (None, 8, 729, 0, 0), (None, 8, 730, 1, 0),
        (1.0, 8, 729, 0, 5832), (1, 1, 729, 0, 729), (0.5, 8, 729, 0, 2916), (0.35, 8, 729, 0, 2041),
        (0.01, 8, 729, 0, 729), (1e-9, 300, 729, 0, 729),
        (0.01, 8, 730, 1, 737),  # a frame, and the class token of the seven others
        (0.01, 8, 261, 5, 296), (0.5, 8, 730, 1, 2920), (1.0, 8, 730, 1, 5840), (0.3, 1, 730, 1, 730),
        (0.25, 2, 5, 0, 5), (0.5, 5, 5, 0, 12),  # of 12.5, the even neighbour
    ],
)  # fmt: skip
def test_an_exact_budget_of_places(encode_ratio, frames, places, prefix, expected):
    config = EarlyTomConfig(variant="plus", encode_ratio=encode_ratio)
    assert config.place_budget(frames, places, prefix) == expected


@given(ratio=st.floats(0, 1, exclude_min=True), frames=st.integers(1, 500), places=st.integers(2, 800), data=st.data())
def test_a_budget_of_places_is_one_that_a_plan_can_keep(ratio, frames, places, data):
    prefix = data.draw(st.integers(0, places - 1))
    budget = EarlyTomConfig(variant="plus", encode_ratio=ratio).place_budget(frames, places, prefix)
    assert places + (frames - 1) * prefix <= budget <= frames * places
    assert budget >= ratio * frames * places - 0.5
    assert budget == EarlyTomConfig(reuse=True, encode_ratio=ratio).place_budget(frames, places, prefix)


@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_presets_with_reuse_say_how_to_select(variant):
    """Their layers of merging are those by whose attention ``paper`` selects."""
    for make in (EarlyTomConfig.from_options, lambda options: EarlyTomConfig(**options)):
        config = make({"preset": "videomme", "retain_ratio": 0.1, "variant": variant, "reuse": True})
        assert config.reuses() and config.tau_seg == 0.3 and config.resolve_merge_layers(26) == ()
        assert config.scored_layer(26) == 23 and config.scored_layer(8) == 6
        assert config.resolve_full_layers(8) == (5, 6, 7)
        merging = make({"preset": "videomme", "retain_ratio": 0.1, "variant": variant, "reuse": False})
        assert merging.resolve_merge_layers(26) == (10, 21, 23)


def test_numpy_numbers_are_numbers_of_reuse_too():
    assert EarlyTomConfig(reuse=True, tau_reuse=np.float32(0.5)).tau_reuse == 0.5
    assert EarlyTomConfig(reuse=True, encode_ratio=np.float64(0.25)).place_budget(8, 10) == 20
    with pytest.raises(EarlyTomConfigError, match="tau_reuse=0.5 with encode_ratio=0.25: a budget .* Leave one"):
        EarlyTomConfig(reuse=True, tau_reuse=0.5, encode_ratio=0.25)


def by_method(name="mine", **what):
    return register_method(Method(name=name, paper="none", **what))


@pytest.fixture
def no_methods(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.parametrize("reuse", [None, True, False])
def test_no_frames_merge_with_another_method(reuse):
    config = EarlyTomConfig(method="visionzip", reuse=reuse)
    assert config.resolve_merge_layers(26) == () and config.keeps_exactly() and config.reuses() is bool(reuse)
    assert config.selects_by_attention() and config.selects_by_keys() and config.scored_layer(26) == 25
    assert config.variant is None, "a variant is one of EarlyTom"
    assert not EarlyTomConfig().selects_by_keys() and not EarlyTomConfig(variant="plus").selects_by_attention()


@pytest.mark.parametrize("asks", [{}, {"importance": True}, {"keys": True}, {"importance": True, "keys": True}])
def test_a_method_gets_what_it_asks_for(no_methods, asks):
    by_method(keep=print, **asks)
    config = EarlyTomConfig(method="mine")
    assert config.selects_by_attention() is asks.get("importance", False)
    assert config.selects_by_keys() is asks.get("keys", False)


@pytest.mark.parametrize(
    ("layer", "layers", "expected"), [(-1, 1, 0), (-1, 26, 25), (0, 1, 0), (5, 6, 5), (5, 5, None), (-2, 5, None)]
)
def test_the_layer_that_a_method_looks_at(no_methods, layer, layers, expected):
    by_method(keep=print, scored_layer=layer)
    config = EarlyTomConfig(method="mine")
    if expected is not None:
        assert config.scored_layer(layers) == expected
        config.require_layers(layers)
        return
    for look in (config.scored_layer, config.require_layers):
        with pytest.raises(EarlyTomConfigError, match=f"method='mine' looks at layer {layer} .*0 to {layers - 1}"):
            look(layers)


@given(ratio=st.floats(0, 1, exclude_min=True), frames=st.integers(1, 500), tokens=st.integers(1, 800))
def test_a_method_that_keeps_nothing_behind_the_encoder_leaves_all_of_it(ratio, frames, tokens):
    registry._registered.pop("inside_only", None)
    by_method("inside_only", inside=lambda ratio, layers: ())
    try:
        config = EarlyTomConfig(method="inside_only", retain_ratio=ratio)
        assert config.token_budget(frames, tokens) == frames * tokens and config.ratio_behind_encoder() == 1
    finally:
        registry._registered.pop("inside_only")
    config = EarlyTomConfig(method="visionzip", retain_ratio=ratio)
    assert config.token_budget(frames, tokens) == EarlyTomConfig(retain_ratio=ratio).token_budget(frames, tokens)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"variant": "plus"}, "variant"),
        ({"variant": "paper"}, "variant"),
        ({"variant": "released"}, "variant"),
        ({"merge_layers": (1, 2)}, "merge_layers"),
        ({"tau_seg": 0.5}, "tau_seg"),
        ({"alpha": 0.5}, "alpha"),
        ({"max_window": 4}, "max_window"),
        ({"tau_merge": 0.5}, "tau_merge"),
        ({"tau_merge": 0.5, "reuse": True}, "tau_merge"),
        ({"static_selection": "host"}, "static_selection"),
        ({"preset": "videomme", "retain_ratio": 0.1}, "preset"),
    ],
)
def test_options_of_earlytom_belong_to_it(options, first):
    message = f"^{first}={re.escape(repr(options[first]))} with method='visionzip': it belongs to EarlyTom's own method"
    for make in (EarlyTomConfig.from_options, lambda options: EarlyTomConfig(**options)):
        with pytest.raises(EarlyTomConfigError, match=message):
            make({"method": "visionzip", **options})


@pytest.mark.parametrize("option", [{"tau_reuse": 0.1}, {"full_layers": (1,)}, {"encode_ratio": 0.5}])
def test_options_of_reuse_need_it_with_a_method_too(option):
    (name,) = option
    with pytest.raises(EarlyTomConfigError, match=f"{name}=.* without reuse, which is off with method='visionzip'"):
        EarlyTomConfig(method="visionzip", **option)
    assert EarlyTomConfig(method="visionzip", reuse=True, **option).reuses()


def test_names_of_methods(no_methods, monkeypatch):
    for bad in ("vision_zip", None, 3):
        with pytest.raises(EarlyTomConfigError, match="method=.*must be one of 'earlytom', .*'visionzip'"):
            EarlyTomConfig(method=bad)
    mine = by_method(keep=print)
    assert EarlyTomConfig(method="mine").chosen() == "method='mine'" and by_method(keep=print) == mine
    assert EarlyTomConfig(variant="plus").chosen() == "variant='plus'"
    for taken in ("mine", "visionzip", "earlytom"):
        with pytest.raises(EarlyTomConfigError, match=f"a method named '{taken}' exists already"):
            by_method(taken)
