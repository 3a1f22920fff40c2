"""What all methods promise that come with the package, whatever their paper says."""

import subprocess
import sys

import pytest
import torch
from effort import examples
from hypothesis import given
from method_videos import cases, video
from torch.utils.flop_counter import FlopCounterMode

from earlytom_compile.methods.base import Method, Sizes
from earlytom_compile.methods.registry import BUILT_IN, method_named

KEEPING = [name for name in BUILT_IN if method_named(name).keep and not method_named(name).keys]


@pytest.mark.parametrize("name", BUILT_IN)
def test_has_its_name_and_says_whose_it_is(name):
    method = method_named(name)
    assert isinstance(method, Method) and method.name == name and "arXiv" in method.paper
    assert method.keep or method.inside


@pytest.mark.parametrize("name", KEEPING)
@examples(60)
@given(case=cases(most_frames=12, most_tokens=8))
def test_keeps_exactly_as_many_as_asked_for_and_the_same_each_time(name, case):
    drawn, budget = case
    before = drawn.features.clone(), drawn.importance.clone()
    tokens, places = method_named(name).keep(drawn, budget)
    frames, number, channels = drawn.features.shape
    assert tokens.shape == (budget, channels) and tokens.dtype == drawn.features.dtype and tokens.isfinite().all()
    order = places[:, 0] * number + places[:, 1]
    assert (order.diff() > 0).all() and (places >= 0).all() and (places < torch.tensor([frames, number])).all()
    transposed = drawn._replace(features=drawn.features.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    for again in (drawn, transposed):
        assert all(map(torch.equal, (tokens, places), method_named(name).keep(again, budget)))
    assert torch.equal(drawn.features, before[0]) and torch.equal(drawn.importance, before[1])


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("sizes", [(1, 1, 3), (1, 9, 4), (7, 6, 4), (9, 1, 4)])
def test_all_tokens_stay_as_they_are(name, sizes):
    drawn = video(5, *sizes)
    tokens, _ = method_named(name).keep(drawn, sizes[0] * sizes[1])
    assert torch.equal(tokens, drawn.features.flatten(0, 1))


def counted(name, drawn, budget):
    """Of one call: the operations of matrix products that torch counts, and those that the method says it has."""
    method, (frames, tokens, channels) = method_named(name), drawn.features.shape
    with FlopCounterMode(display=False) as counter:
        method.keep(drawn, budget)
    said = method.operations(Sizes(frames, tokens, channels, 0, budget)) if method.operations else 0
    return counter.get_total_flops(), said


@pytest.mark.parametrize("name", KEEPING)
@examples(60)
@given(case=cases(most_frames=20, most_tokens=8))
def test_has_no_more_products_than_it_says(name, case):
    found, said = counted(name, *case)
    assert found <= said


@pytest.mark.parametrize(("name", "least"), [("holitom", 1), ("prunevid", 0.7), ("fastvid", 0.4)])
def test_may_have_as_many_products_as_it_says(name, least):
    """Frames that stand still two by two. What PruneVid and FastVID have most of, no one video has all of."""
    pairs = torch.randn(8, 9, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    found, said = counted(name, video(3, 16, 9, 6)._replace(features=pairs), 40)
    assert least * said <= found <= said


@pytest.mark.gpu(only=True)
@pytest.mark.parametrize("name", KEEPING)
@examples(40)
@given(case=cases(most_frames=12, most_tokens=16))
def test_a_gpu_keeps_what_a_cpu_keeps(name, case):
    drawn, budget = case
    tokens, places = method_named(name).keep(drawn, budget)
    there = drawn._replace(features=drawn.features.cuda(), importance=drawn.importance.cuda())
    found = method_named(name).keep(there, budget)
    assert found.tokens.is_cuda and found.places.is_cuda and torch.equal(found.places.cpu(), places)
    rounding = torch.finfo(tokens.dtype).eps  # of means, whose sums are added in another order
    torch.testing.assert_close(
        found.tokens.cpu(), tokens, rtol=rounding, atol=drawn.features.abs().max().item() * 2**-46
    )


def test_names_need_no_torch_nor_do_those_that_act_inside_the_language_model():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from earlytom_compile.config import EarlyTomConfig\n"
        "from earlytom_compile.methods.registry import BUILT_IN, method_names\n"
        "assert set(BUILT_IN) < set(method_names())\n"
        "for name in 'fastv', 'pyramiddrop':\n"
        "    assert EarlyTomConfig(method=name).steps_inside(28)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
