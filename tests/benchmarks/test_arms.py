"""Which arms there are, which of them are chosen, and with what options."""

import contextlib

from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.benchmarks.arms import EVERY, Arm, arm_names, asked_methods, choose, of_method, require_beginnings
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.methods.registry import method_names

WHOLE = method_names()
METHODS = [name for name in WHOLE if name != "earlytom"]
NAMES = arm_names((0.25, 0.1), {}, METHODS)
ARMS = [Arm(name, print) for name in NAMES]


@examples(60)
@given(st.lists(st.sampled_from(["earlytom", "inductor", *METHODS]), min_size=1, unique=True), st.data())
def test_other_papers_methods_are_arms_where_somebody_asks_for_them(names, data):
    """Among the names of all arms, by their beginnings; ``all`` is every one."""
    assert asked_methods((0.25, 0.1), ()) == []
    assert asked_methods((0.25, 0.1), ("inductor", EVERY)) == METHODS
    words = [data.draw(st.sampled_from([arm for arm in NAMES if arm.partition(" ")[0] == name])) for name in names]
    beginnings = [word[: data.draw(st.integers(1, len(word)))] for word in words]
    require_beginnings(NAMES, beginnings)
    # A whole method's name is its own arms' beginning alone: fastv is not fastvid.
    begun = [
        arm
        for arm in NAMES
        if any(
            arm[: len(beginning)] == beginning and (beginning not in WHOLE or arm[len(beginning)] == " ")
            for beginning in beginnings
        )
    ]
    assert asked_methods((0.25, 0.1), beginnings) == [
        name for name in METHODS if name in {arm.partition(" ")[0] for arm in begun}
    ]
    assert [arm.name for arm in choose(ARMS, beginnings)] == begun
    assert choose(ARMS, (EVERY,)) == ARMS


@examples(60)
@given(
    st.sampled_from(METHODS),
    st.fixed_dictionaries(
        {},
        optional={
            "variant": st.sampled_from(["paper", "plus"]),
            "reuse": st.just(True),
            "tau_reuse": st.just(0.1),
            "merge_layers": st.just((1,)),
            "max_window": st.just(4),
            "inner_layer": st.just(2),
            "inner_drop_ratio": st.just(0.3),
            "mode": st.just("max-autotune"),
            "lowering": st.just("eager"),
            "strict": st.just(True),
        },
    ),
)
def test_a_method_gets_of_the_options_what_means_something_to_it(method, options):
    found = of_method(method, options)
    assert found.items() <= {**options, "method": method}.items() and found["method"] == method
    with contextlib.suppress(EarlyTomConfigError):  # where it takes all of them, none is missing
        assert EarlyTomConfig.from_options({**options, "method": method}) == EarlyTomConfig.from_options(found)
    if "inner_layer" in options or "inner_drop_ratio" not in options:  # else nobody takes it
        EarlyTomConfig.from_options(found)
    assert found.keys() >= options.keys() & {"reuse", "mode", "lowering", "strict"}
