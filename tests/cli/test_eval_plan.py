"""Which evaluations are made, in which order, and with which settings."""

import pytest

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli.eval_plan import plan, preset_of, with_variant
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.presets import PRESETS


def settings(evaluation):
    config = EarlyTomConfig.from_options({**evaluation.options, "retain_ratio": evaluation.retain_ratio})
    return config.tau_seg, config.merge_layers


def test_all_tokens_come_first_and_always():
    found = plan(["a", "b"], (0.25, 0.1), {"lowering": "eager"}, half_billion=False)
    assert [evaluation.key for evaluation in found] == [
        ("a", None), ("b", None), ("a", 0.25), ("b", 0.25), ("a", 0.1), ("b", 0.1),
    ]  # fmt: skip
    assert found[0].options == found[1].options == {}
    assert [evaluation.name for evaluation in found[1:3]] == ["b, all tokens", "a, 25%"]


# Table 8 of the paper, read off by hand.
@pytest.mark.parametrize(
    "task, ratio, half_billion, expected",
    [
        ("mvbench", 0.25, False, (0.8, (6, 14, 20))),
        ("mvbench_action_count", 0.1, False, (0.65, (8, 14, 20))),
        ("mvbench", 0.1, True, (0.65, (8, 21, 23))),
        ("egoschema_subset", 0.15, False, (0.5, (10, 21, 23))),
        ("longvideobench_val_v", 0.25, False, (0.8, (6, 21, 23))),
        ("videomme", 0.2, False, (0.5, (8, 21, 23))),
        ("videomme", 0.25, True, (0.6, (8, 21, 23))),
        ("videomme", 0.3, False, (0.6, None)),  # no such row: the defaults
        ("videommmu", 0.2, False, (0.6, None)),
        ("mlvu_dev", 0.2, False, (0.6, None)),
    ],
)
def test_a_task_has_the_settings_of_table_8(task, ratio, half_billion, expected):
    *_, evaluation = plan([task], (ratio,), {}, half_billion=half_billion)
    assert settings(evaluation) == expected
    assert evaluation.settings == ("default" if expected[1] is None else evaluation.options["preset"])


def test_every_preset_is_some_tasks():
    tasks = ("mvbench", "egoschema", "longvideobench_val_v", "videomme")
    found = {preset_of(task, 0.2, half_billion=small) for task in tasks for small in (True, False)}
    assert found == set(PRESETS)


def test_what_the_user_says_wins():
    (_, own) = plan(["videomme"], (0.2,), {"tau_seg": 0.9}, half_billion=False)
    assert settings(own) == (0.9, (8, 21, 23))
    (_, _, *others) = plan(["mlvu_dev", "mvbench"], (0.2,), {"preset": "egoschema"}, half_billion=True)
    assert {settings(evaluation) for evaluation in others} == {(0.6, (10, 21, 23))}
    (_, none) = plan(["videomme"], (0.2,), {"preset": None}, half_billion=False)
    assert settings(none) == (0.6, None) and none.settings == "default" and "preset" not in none.options


@pytest.mark.parametrize(
    "tasks, ratios, options, variant",
    [
        (["mlvu_dev"], (0.25, 0.1), {}, "plus"),
        (["mlvu_dev", "mvbench"], (0.25, 0.1), {}, "paper"),  # one table, one variant
        (["mvbench"], (0.3,), {}, "plus"),  # no such row
        (["mvbench"], (0.3, 0.1), {}, "paper"),
        (["mvbench"], (0.1,), {"tau_seg": 0.5}, "paper"),
        (["mvbench"], (0.1,), {"preset": None}, "plus"),
        (["mlvu_dev"], (0.1,), {"preset": "videomme"}, "paper"),
        (["mvbench", "mlvu_dev"], (0.1,), {"variant": "plus"}, "plus"),
        (["mlvu_dev"], (0.1,), {"variant": "released"}, "released"),
        (["mlvu_dev"], (0.1,), {"method": "visionzip"}, None),
    ],
)
def test_a_table_has_one_variant_the_papers_where_table_8_has_settings(tasks, ratios, options, variant):
    options = with_variant(tasks, ratios, options)
    made = [each for each in plan(tasks, ratios, options, half_billion=False) if each.retain_ratio is not None]
    found = [EarlyTomConfig.from_options({**each.options, "retain_ratio": each.retain_ratio}) for each in made]
    assert found and {config.variant for config in found} == {variant}


@pytest.mark.parametrize(
    "tasks, ratios, options, says",
    [
        (["a", "b", "a"], (0.1,), {}, "tasks: a is there twice"),
        (["a"], (0.1, 0.1), {}, "retain_ratios: 0.1 is there twice"),
        (["a"], (0.3,), {"preset": "videomme"}, "Table 8 has rows for 0.25"),
        (["a"], (0.1,), {"mode": "max-autotune", "lowering": "eager"}, "nothing is compiled"),
        (["a"], (0.1,), {"variant": "plus", "static_selection": "host"}, "static_selection='host'"),
        (["a"], (0.1,), {"tau_seg": 0.5}, 'tau_seg=0.5 with variant="plus", the default'),
    ],
)
def test_mistakes(tasks, ratios, options, says):
    with pytest.raises(EarlyTomConfigError, match=says):
        plan(tasks, ratios, options, half_billion=False)
