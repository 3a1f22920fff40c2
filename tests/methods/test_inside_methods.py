import pytest
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.methods.base import Step
from earlytom_compile.methods.registry import method_named

ratios = st.floats(0.01, 1)


@examples(50)
@given(ratio=ratios, layers=st.integers(3, 96))
def test_fastv_leaves_tokens_out_behind_its_second_layer(ratio, layers):
    config = EarlyTomConfig(method="fastv", retain_ratio=ratio)
    assert config.reduces_inside() and method_named("fastv").keep is None
    assert config.steps_inside(layers) == (Step(2, ratio, "drop", "all"),)


@examples(50)
@given(ratio=ratios, layers=st.integers(4, 96))
def test_pyramiddrop_has_three_steps_down_to_the_ratio(ratio, layers):
    steps = EarlyTomConfig(method="pyramiddrop", retain_ratio=ratio).steps_inside(layers)
    before = [step.layer for step in steps]
    assert 1 <= before[0] < before[1] < before[2] < layers
    stages = [after - start for start, after in zip([0, *before], [*before, layers], strict=True)]
    assert max(stages) - min(stages) <= 1
    shares = [1.0, *(step.keep_ratio for step in steps)]
    rates = [after / share for share, after in zip(shares, shares[1:], strict=False)]
    assert rates == pytest.approx([rates[0]] * 3) and shares[-1] == ratio
    assert all(step.merge == "drop" and step.scores == "last" for step in steps)


def test_pyramiddrop_of_the_paper():
    steps = EarlyTomConfig(method="pyramiddrop", retain_ratio=0.125).steps_inside(32)
    assert [step.layer for step in steps] == [8, 16, 24]
    assert [step.keep_ratio for step in steps] == pytest.approx([0.5, 0.25, 0.125])


@pytest.mark.parametrize(("name", "layers", "cure"), [("fastv", 2, "at least 3"), ("pyramiddrop", 3, "fastv")])
def test_too_few_layers_are_refused_by_name(name, layers, cure):
    with pytest.raises(EarlyTomConfigError, match=f"{name}.*{layers} layers.*{cure}"):
        EarlyTomConfig(method=name).steps_inside(layers)
