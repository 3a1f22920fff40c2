"""The Triton provider of plan_reuse: the plan of the native body to the last bit, launches, and ptxas."""

import itertools
from dataclasses import replace

import pytest
import torch
from effort import cases, examples
from hypothesis import given
from op_inputs import DEVICE, DTYPES, RUNS, clip, dtypes, laid_out, layouts
from test_plan_reuse import assert_plans_equal, calls, noisy

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_plan_reuse  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu


def run(pixels, *options):
    plan = triton_plan_reuse.run(pixels.to(DEVICE), *options)
    assert all(part.is_contiguous() for part in plan)
    return [part.cpu() for part in plan]


@examples(8)
@given(call=calls(dtypes, side=3), layout=layouts)
def test_is_the_native_operator(call, layout):
    """Sums are float64, in another order, and rounded to float32: to the same."""
    laid = replace(call, pixels=laid_out(call.pixels.to(DEVICE), layout))
    assert_plans_equal(laid.plan(run), call.plan())


@pytest.mark.parametrize(
    "dtype, budget", cases((torch.float32, 0), (torch.bfloat16, 0), among=[*itertools.product(DTYPES, (0, 20))])
)
def test_is_the_native_operator_on_patches_of_a_real_size(dtype, budget):
    pixels = torch.stack([clip(v, 4, 3, 36, 50) for v in range(2)]).to(dtype)
    options = ([2, 3], [14, 14], 1, 0.03, budget)
    assert_plans_equal(run(pixels, *options), torch.ops.earlytom.plan_reuse(pixels, *options))


@pytest.mark.parametrize("patch", [[1, 1], [1, 4], [5, 1], [2, 3], [7, 4]])
@pytest.mark.parametrize("frames", [1, 3])
def test_patches_whose_quarters_are_unequal_or_fewer(frames, patch):
    pixels = clip(5, frames, 3, 14, 17, steps=4)
    options = ([2, 3], patch, 3, 0.1, 0)
    assert_plans_equal(run(pixels, *options), torch.ops.earlytom.plan_reuse(pixels, *options))


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_noise_counts_unless_it_is_as_loud_as_the_picture(sigma):
    pixels = noisy(sigma, size=12)[:3]
    options = ([2, 2], [6, 6], 0, 0.25, 0)
    plan = run(pixels, *options)
    assert (plan[3][0, 0] > 0) == (sigma < 1)
    assert_plans_equal(plan, torch.ops.earlytom.plan_reuse(pixels, *options))


@pytest.mark.parametrize("budget", [0, 14])
def test_more_places_than_a_program_has_lanes(budget, monkeypatch):
    monkeypatch.setattr(triton_plan_reuse, "_PLACES", 4)
    pixels = clip(6, 3, 1, 2, 18, steps=2)
    options = ([1, 9], [2, 2], 0, 0.1, budget)
    assert_plans_equal(run(pixels, *options), torch.ops.earlytom.plan_reuse(pixels, *options))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("budget", [0, 20])
def test_what_is_not_finite_counts_as_changed(value, budget):
    pixels = clip(2, 6, 1, 8, 8)
    pixels[2, 0, 5, 1] = value
    options = ([2, 2], [4, 4], 1, 0.03, budget)
    plan, expected = run(pixels, *options), torch.ops.earlytom.plan_reuse(pixels, *options)
    assert torch.equal(plan[1].isnan(), expected[1].isnan())
    assert_plans_equal([part.nan_to_num() for part in plan], [part.nan_to_num() for part in expected])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_budget_that_what_is_not_finite_does_not_fit_is_marked_and_still_a_plan():
    pixels = torch.zeros(2, 3, 1, 8, 8)
    pixels[0, 1] = float("nan")
    source, _, computed, _ = run(pixels, [2, 2], [4, 4], 0, 0.0, 6)
    assert computed.tolist() == [-1, 6]
    assert source[0].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert (source[1] == torch.arange(3)[:, None]).sum() == 6


@pytest.mark.parametrize("budget", [0, 8])
def test_has_the_same_bits_in_any_company_and_any_run(budget):
    pixels = torch.stack([clip(v, 4, 2, 5, 7) for v in range(2)])
    options = ([1, 2], [4, 3], 1, 0.03, budget)
    together = run(pixels, *options)
    for v in range(2):
        for _ in range(RUNS // 2 if DEVICE == "cpu" else RUNS):
            assert_plans_equal(run(pixels[v], *options), [part[v : v + 1] for part in together])


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.mark.parametrize("prefix", [0, 2])
def test_launches_as_often_as_is_written(prefix, monkeypatch):
    launches = []
    for name in ("_measure", "_scan", "_halve", "_totals", "_least_to_the_end_of_the_run"):
        monkeypatch.setattr(triton_plan_reuse, name, Counted(getattr(triton_plan_reuse, name), launches))
    for budget, expected in ((0, 4), (10, 30)):
        launches.clear()
        run(clip(0, 3, 1, 8, 8), [2, 2], [4, 4], prefix, 0.03, budget)
        assert len(launches) == expected
        assert launches.count("_scan") == (14 if budget else 1)


@pytest.mark.gpu(only=True)  # what waits for the device raises
@pytest.mark.parametrize("budget", [0, 1500])
def test_never_waits_for_the_device(budget):
    pixels = clip(0, 4, 3, 384, 384).to(DEVICE)
    options = ([27, 27], [14, 14], 1, 0.03, budget)
    triton_plan_reuse.run(pixels, *options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_plan_reuse.run(pixels, *options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pixels": torch.ones(2, 3, 8)}, "3 axes"),
        ({"grid": [3, 2]}, "needs 12 x 8"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"budget": 9}, "budget=9"),
    ],
)
def test_refuses_what_its_shape_tells(changes, says):
    arguments = {"pixels": torch.ones(2, 3, 8, 8), "grid": [2, 2], "patch": [4, 4], "prefix": 0, "tau": 0.0}
    arguments |= {"budget": 0} | changes
    with pytest.raises(ValueError, match=f"plan_reuse.*{says}"):
        run(*arguments.values())


def test_is_the_provider_of_patches_that_fit_into_registers():
    for dtype, side, expected in (
        (torch.float32, 14, "triton"), (torch.bfloat16, 32, "triton"), (torch.float16, 40, "native"),
        (torch.float64, 14, "native"),
    ):  # fmt: skip
        arguments = torch.ones(1, 3, side, side, dtype=dtype), [1, 1], [side, side], 0, 0.03, 0
        assert provider_of("plan_reuse", "cuda", *arguments) == expected
        assert provider_of("plan_reuse", "cpu", *arguments) == "native"


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_plan_reuse as module

KERNELS = {  # of patches of 3 x 14 x 14 in a grid of 27 x 27
    "_scan": ({"BLOCK": 1024, "GROUPS": 16, "PIXELS_COUNT": 3}, {"num_warps": 4}),
    "_measure": ({"GROUPS": 16, "QUARTER": 64, "BLOCK": 256}, {"num_warps": 4}),
    "_halve": ({"LAST": False, "BLOCK": module._PLACES}, {"num_warps": 1}),
    "_totals": ({"SIZES": 16, "BLOCK": module._PLACES}, {"num_warps": 1}),
    "_least_to_the_end_of_the_run": ({"BLOCK": module._PLACES}, {"num_warps": 4}),
}
POINTERS = {
    "sums": "*fp64", "sums_out": "*fp64", "squares_out": "*fp64", "noise_out": "*fp32",
    "threshold": "*fp32", "low": "*fp32", "high": "*fp32",
    "source_out": "*i64", "change_out": "*fp32", "active_out": "*i32", "source": "*i64", "change": "*fp32",
    "least_out": "*fp32", "active": "*i32", "total_out": "*i64",
}
for name in ("fp32", "fp16", "bf16"):
    for kernel, (constants, options) in KERNELS.items():
        types = POINTERS | {"pixels": "*" + name} | ({"active_out": "*i64"} if kernel == "_totals" else {})
        compiled = getattr(module, kernel)
        kinds = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in compiled.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] == "*"}
        source = ASTSource(fn=compiled, signature=kinds, constexprs=constants, attrs=aligned)
        options = options | {"enable_fp_fusion": False}
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        open(f"{sys.argv[1]}/{kernel}-{name}.cubin", "wb").write(binary.asm["cubin"])
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 15
    for binary in binaries:
        hopper.no_spills(binary)
