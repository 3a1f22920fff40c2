"""The comparison of ``earlytom eval --toy`` in this world: every kind of row, what it costs, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pools import tiny_model
from torch_counter import counter

from earlytom_compile.cli.main import main
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.photoworld import model as photo
from earlytom_compile.photoworld.model import VIDEO_TOKENS, build_model, save
from earlytom_compile.photoworld.questions import CATEGORIES
from earlytom_compile.toyworld import evaluate, pareto_rows, report, timing, worlds
from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.baselines import AVERAGING, POOLING, SUBSAMPLING
from earlytom_compile.toyworld.evaluate import Arm, Result
from earlytom_compile.toyworld.installed import PLUS_MERGING, REUSE
from earlytom_compile.toyworld.merging import RUNS
from earlytom_compile.toyworld.methods import ALL_TOKENS, NO_TOKENS, RANDOM, STAGE_1
from earlytom_compile.toyworld.worlds import TOY

FEW = (("tau_run", 0.5),)
ROWS = {  # and how many tokens each leaves; None: what is in the video decides
    Arm(ALL_TOKENS): VIDEO_TOKENS,
    Arm(NO_TOKENS): 0,
    Arm(STAGE_1): None,
    Arm(REUSE): VIDEO_TOKENS,
    Arm("earlytom paper", 0.1): 102,
    Arm("earlytom released", 0.1): None,
    Arm("earlytom plus", 0.1): 102,
    Arm("earlytom plus, inner", 0.1): 102,
    Arm(PLUS_MERGING, 0.1): 102,
    Arm("visionzip", 0.1): 102,
    Arm("fastv", 0.25): VIDEO_TOKENS,
    Arm(RANDOM, 0.1): 102,
    Arm(SUBSAMPLING, 0.25): 256,
    Arm(AVERAGING, 0.1): 128,
    Arm(POOLING, 0.25): 256,
    Arm(POOLING, None, (("grid", (4, 2, 2)),)): 16,
    Arm(RUNS, None, FEW): None,
    Arm(RUNS, 0.1, FEW): None,
}


@pytest.fixture(scope="module")
def world():
    return worlds.world_named("photo")


@pytest.fixture(scope="module")
def model():
    return build_model(5, vision_layers=2, text_layers=3)  # fastv acts before layer 2


@pytest.fixture(scope="module")
def questions(world):
    return evaluate.load_questions("validation", 3, 2, world=world)


LONG = ("earlytom released", "earlytom plus, inner", PLUS_MERGING)


@pytest.mark.parametrize(
    "arm",
    [pytest.param(arm, marks=pytest.mark.long if arm.method in LONG else (), id=report.label(arm)) for arm in ROWS],
)
def test_every_kind_of_row_is_counted(model, questions, arm):
    found = evaluate.evaluate(model, questions, arm)
    expected = [[category in {q.category for q in asked} for category in CATEGORIES] for asked in questions.asked]
    assert np.array_equal(found.asked, expected) and not (found.right & ~found.asked).any()
    assert found.categories == CATEGORIES
    if ROWS[arm] is not None:
        assert found.cost.tokens == ROWS[arm]
    assert 0 <= found.cost.tokens <= VIDEO_TOKENS and 0 <= found.cost.work <= 1
    assert found.cost.flops > 0
    again = Result.from_dict(json.loads(json.dumps(found.to_dict() | {"interval": None})))
    assert again.arm == arm and again.categories == CATEGORIES and np.array_equal(again.right, found.right)


@pytest.mark.parametrize("arm", [Arm(ALL_TOKENS), Arm(SUBSAMPLING, 0.1), Arm(RUNS, None, FEW)], ids=report.label)
def test_operations_are_those_that_torch_counts_class_token_included(model, questions, arm):
    compress, pixels = evaluate.made(model, arm, {}), normalized(questions.frames[0])
    with torch.no_grad(), counter() as counted:
        found = compress(pixels)
    assert found.flops == counted.get_total_flops()


@pytest.mark.parametrize("arm", [Arm(ALL_TOKENS), Arm(STAGE_1), Arm("earlytom plus", 0.1)], ids=report.label)
@torch.no_grad()
def test_the_first_token_is_the_rows_answer(model, questions, world, arm):
    compress, pixels, asked = evaluate.made(model, arm, {}), normalized(questions.frames[0]), questions.asked[0]
    call = timing.first_token(model, arm, compress, world)
    logits, _ = world.answer_logits(model, [compress(pixels).tokens], world.rows_of([asked]))
    assert [call(pixels, question)[0, -1].item() for question in asked[:3]] == logits[::2].argmax(-1).tolist()[:3]


def test_frames_that_never_merge_keep_all_tokens(model, questions):
    never = evaluate.evaluate(model, questions, Arm(STAGE_1, None, (("tau_merge", 2.0),)))
    assert never.cost.tokens == VIDEO_TOKENS and never.cost.work == 1


def test_a_held_out_pair_is_seen_among_flashes_too(world):
    video = world.sample_video("train", 0)
    assert not world.shows_held_out(video)
    flashing = next(v for v in (world.sample_video("train", seed) for seed in range(99)) if v.scenes[0].flashes)
    scene = flashing.scenes[0]
    flash = replace(scene.flashes[0], thing=replace(scene.flashes[0].thing, color="red", shape="ring"))
    changed = replace(flashing, scenes=(replace(scene, flashes=(flash,)), *flashing.scenes[1:]))
    assert world.shows_held_out(changed) and not world.shows_held_out(flashing)


def settings_of(rows, name):
    return {dict(arm.settings)[name] for arm in rows if name in dict(arm.settings)}


def test_layers_frames_and_blocks_have_the_same_share_in_both_worlds(world):
    first, second = pareto_rows.arms(world=TOY), pareto_rows.arms(world=world)
    assert settings_of(first, "full_layers") == {
        (), (7,), (6, 7), (4, 5, 6, 7), (2, 3, 4, 5, 6, 7),
    }  # fmt: skip
    assert settings_of(second, "full_layers") == {
        (), (11,), (9, 10, 11), tuple(range(6, 12)), tuple(range(3, 12)),
    }  # fmt: skip
    assert settings_of(first, "merge_layers") == {(0,), (1,), (3, 6)}
    assert settings_of(second, "merge_layers") == {(0,), (2,), (5, 9)}
    assert settings_of(first, "inner_layer") == settings_of(second, "inner_layer") == {2}
    assert settings_of(first, "frames") == {*range(1, 8)} and settings_of(second, "frames") == {*range(2, 16, 2)}
    grids = zip(*(settings_of(rows, "grid") for rows in (first, second)), strict=True)
    assert sorted(2**3 * np.prod(grid) for grid, _ in grids) == sorted(map(np.prod, settings_of(second, "grid")))
    halfway = {arm.retain_ratio for arm in first if "inner_layer" in dict(arm.settings)}
    assert halfway == {round(ratio / 0.7, 3) for ratio in (0.25, 0.2, 0.15, 0.1, 0.5, 0.35, 0.05)}
    # Of 5 layers two have r, three 0.4 r.
    halfway = {arm.retain_ratio for arm in second if "inner_layer" in dict(arm.settings)}
    assert halfway == {round(ratio / 0.64, 3) for ratio in (0.25, 0.2, 0.15, 0.1, 0.5, 0.35, 0.05)}
    assert {arm.method for arm in first} - {arm.method for arm in second} == {*world.unreadable}


def test_a_missing_package_is_named(monkeypatch):
    def missing():
        raise ImportError("No module named 'onnx'")

    monkeypatch.setattr(worlds, "_photo", missing)
    with pytest.raises(
        EarlyTomConfigError, match=r"world='photo': No module named 'onnx': pip install '.\[toy,photo\]"
    ):
        worlds.world_named("photo")


# --- The command ------------------------------------------------------------------------------------

COMMAND = ["eval", "--toy", "--world", "photo", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save(tiny_model(seed=1), tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(autouse=True)
def tower(monkeypatch):
    monkeypatch.setattr(photo, "dinov2", lambda: tiny_model(seed=8).model.vision_tower)


def test_the_command_counts_goes_on_and_draws(folder, tmp_path, capsys):
    file, plots = tmp_path / "a.json", tmp_path / "plots"
    words = [*COMMAND, "--model", folder, "--videos", "2", "--repeats", "1", "--retain-ratios", "0.1"]
    assert main([*words, "--methods", "frame s", "--json", str(file)]) == 0
    before = json.loads(file.read_text())
    assert before["world"] == "photo" and list(before["results"][0]["categories"]) == list(CATEGORIES)
    assert "without only stage 2, top-k without decoupling" in capsys.readouterr().err
    more = ["--methods", "frame s,average", "--resume", "--plot", str(plots), "--markdown", str(tmp_path / "a.md")]
    assert main([*words, *more, "--json", str(file)]) == 0
    after = json.loads(file.read_text())
    assert after["results"][:2] == before["results"] and len(after["results"]) == 3
    printed, table = capsys.readouterr().out, (tmp_path / "a.md").read_text()
    assert all(category in printed and category in table for category in CATEGORIES)
    assert (plots / "categories.png").exists()
    first = ["eval", "--toy", *words[-6:], "--device", "cpu", "--methods", "frame s", "--json", str(file)]
    assert main([*first, "--resume"]) == 2
    assert "was made with world='photo'" in capsys.readouterr().err


def test_pareto_has_its_own_rows(folder, tmp_path):
    file = tmp_path / "a.json"
    words = [*COMMAND, "--model", folder, "--videos", "2", "--repeats", "0", "--pareto", "--methods", "average p"]
    assert main([*words, "--json", str(file), "--plot", str(tmp_path)]) == 0
    grids = [row["settings"]["grid"] for row in json.loads(file.read_text())["pareto"][1:]]
    assert len(grids) == 8 and [8, 4, 4] in grids and (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    "more, says",
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--methods", "only stage 2"], "methods='only stage 2': no method begins so"),
        (["--encoded"], "frames of the world photo come out of a file anyhow"),
    ],
)
def test_mistakes_are_named(more, says, folder, capsys):
    if "--encoded" in more:
        more = [*more, "--model", folder, "--methods", "frame s"]
    assert main([*COMMAND, *more]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
