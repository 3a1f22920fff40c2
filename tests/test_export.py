"""The video path as a program: the rows of the compiled model, fewer frames computed where fewer are left, and none of
our operators in it."""

import json
import subprocess
import sys

import pytest
import torch
from scenes import video
from tiny_models import tiny_llava_onevision
from tiny_qwen import PATCH, Clip, qwen_inputs, tiny_qwen
from torch.fx import Interpreter

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError
from earlytom_compile.integrations.export import package

FRAMES, SIZE = 10, 24
PAPER = {"variant": "paper", "retain_ratio": 0.2, "merge_layers": (0, 1)}


def videos(frames=FRAMES, size=SIZE):
    """Moving ones, some with cuts, and still ones: [1, F, 3, H, W] each, by name."""
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "restless": {"scenes": frames},
        "drifting": {"drift": 0.25},
        "two scenes": {"scenes": 2, "drift": 0.1},
        "still": {"static": True},
    }
    return {name: video(frames, size, **kind, generator=generator)[None] for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=3, vision_hidden=16, image_size=SIZE)


@pytest.fixture(scope="module")
def program(model):
    return earlytom_compile.export(model, frames=FRAMES, **PAPER)


class Attended(Interpreter):
    """Runs a program, and keeps how many frames go through each attention."""

    def __init__(self, program):
        super().__init__(program.module())
        self.frames = []

    def call_function(self, target, args, kwargs):
        if "attention" in str(target):
            self.frames.append(args[0].shape[0])
        return super().call_function(target, args, kwargs)


def same_rows(path, model, options, some=videos):
    """Compares with the model compiled in place, and returns how many frames were left of each video."""
    earlytom_compile.compile(model, **options, lowering="eager")
    left = {}
    for name, pixels in some().items():
        (rows,) = earlytom_compile.encode_videos(model, pixels)
        torch.testing.assert_close(path(pixels), rows, msg=lambda text, name=name: f"{name}: {text}")
        left[name] = earlytom_compile.report(model).to_dict()["videos"][0]["frames"]
    earlytom_compile.restore(model)
    return left


def test_gives_the_rows_of_the_compiled_model_for_videos_of_all_kinds(program, model):
    left = same_rows(program.module(), model, PAPER)
    assert len({tuple(frames) for frames in left.values()}) > 2, "these videos show nothing about frames left"


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"variant": "plus"}, {"variant": "plus", "reuse": False, "merge_layers": (0, 1)}, {"reuse": True}]
)
def test_all_ways_to_compress(options, model):
    options = {"retain_ratio": 0.2, **options}
    same_rows(earlytom_compile.export(model, frames=FRAMES, **options).module(), model, options)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_tells_the_places_of_rows_too(kind):
    model, options = tiny_qwen(kind, vision_layers=4, full=(1, 3), deepstack=(0, 2)), {"retain_ratio": 0.25}
    path = earlytom_compile.export(model, frames=16, frame_size=(4 * PATCH, 6 * PATCH), **options).module()
    earlytom_compile.compile(model, **options, lowering="eager")
    for clip in (Clip(8, 4, 6), Clip(8, 4, 6, scenes=8), Clip(8, 4, 6, still=True)):
        given = qwen_inputs(model, [[clip]])
        pixels, grid = given["pixel_values_videos"], given["video_grid_thw"]
        (expected,) = earlytom_compile.encode_videos(model, pixels, video_grid_thw=grid)
        rows, places = path(pixels)
        torch.testing.assert_close(rows, expected)
        assert_takes_places(model, pixels, grid, places)


@torch.no_grad()
def assert_takes_places(model, pixels, grid, places):
    handle = model._earlytom
    (video,) = handle.family.videos(model, {"pixel_values_videos": pixels, "video_grid_thw": grid})
    assert places.tolist() == handle.encoder.encode(video).places().tolist()


def test_qwen_needs_the_size_of_pictures():
    with pytest.raises(EarlyTomConfigError, match=r"frame_size=None: Qwen2.5-VL takes pictures of many sizes"):
        earlytom_compile.export(tiny_qwen("qwen2_5_vl"), frames=8)


def test_computes_fewer_frames_where_fewer_are_left(program):
    seen = {}
    for name, pixels in videos().items():
        attended = Attended(program)
        attended.run(pixels)
        seen[name] = attended.frames
    assert seen["restless"] == [FRAMES] * 3
    assert seen["still"][0] == FRAMES and FRAMES > seen["still"][1] > seen["still"][2]


def test_has_nothing_of_ours_in_it(program):
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {target for target in targets if "earlytom" in target}
    assert any("while_loop" in target for target in targets)


def test_says_what_it_takes_and_gives(program):
    says = program.graph_module.meta["earlytom"]
    assert json.loads(says["inputs"]) == {"pixel_values_videos": "float32 [1, 10, 3, 24, 24] on cpu"}
    assert json.loads(says["outputs"]) == {"rows": "float32 [19, 48] on cpu"}
    assert json.loads(says["options"])["retain_ratio"] == 0.2 and says["torch"] == torch.__version__


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"variant": "released"},
            r"variant='released' cannot be exported: how many rows it keeps depends on the video",
        ),
        ({"method": "visionzip"}, r"method='visionzip' can be no part of a program. Leave it out"),
        ({"variant": "plus", "encode_ratio": 0.5}, r"encode_ratio=0.5 can be no part of a program"),
        ({"lowering": "eager"}, r"lowering='eager' can be no part"),
        ({"variant": "paper", "static_selection": "host"}, r"static_selection='host' can be no part"),
        ({"mode": "reduce-overhead"}, r"mode='reduce-overhead' can be no part"),
        ({"inner_layer": 1}, r"inner_layer=1 can be no part"),
        ({"retain": 0.1}, r"unknown option 'retain'; did you mean 'retain_ratio'"),
        ({"frames": 0}, r"frames=0: must be a whole number of pictures, at least 1"),
        ({"frames": 2.5}, r"frames=2.5: must be a whole number"),
        ({"frame_size": (48, 48)}, r"48x48 for LLaVA-OneVision: it takes 24x24"),
        ({"variant": "paper", "merge_layers": (7,)}, r"merge_layers=\(7,\): layer 7 does not exist"),
    ],
)
def test_refuses_what_a_program_cannot_be(model, options, said):
    with pytest.raises(EarlyTomConfigError, match=said):
        earlytom_compile.export(model, **{"frames": FRAMES, **options})


def test_refuses_where_dynamo_is_off(model):
    with torch.compiler.set_stance("force_eager"), pytest.raises(EarlyTomCompileError, match="Dynamo did not trace"):
        earlytom_compile.export(model, frames=FRAMES, **PAPER)


def test_a_package_has_a_name_and_a_program_of_ours(program, tmp_path):
    with pytest.raises(EarlyTomConfigError, match=r"video.zip': the name of a package must end in .pt2"):
        package(program, tmp_path / "video.zip")
    other = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(EarlyTomConfigError, match=r"package\(\) takes what earlytom_compile.export\(\) returned"):
        package(other, tmp_path / "video.pt2")


WITHOUT_US = """
import json, sys, torch
sys.modules["earlytom_compile"] = sys.modules["transformers"] = None  # importing them is an error
path = torch._inductor.aoti_load_package(sys.argv[1])
given = torch.load(sys.argv[2])
torch.save({name: path(pixels) for name, pixels in given.items()}, sys.argv[3])
print(json.dumps(path.get_metadata()))
"""


def in_another_process(file, given, folder):
    """What a package makes of each of ``given`` in a process that has torch alone; and what it says of itself."""
    torch.save(given, folder / "given.pt")
    words = (sys.executable, "-c", WITHOUT_US, file, folder / "given.pt", folder / "made.pt")
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "made.pt"), json.loads(run.stdout)


@pytest.mark.long
@pytest.mark.parametrize("options", [PAPER, {"retain_ratio": 0.2, "variant": "plus"}], ids=["paper", "plus"])
def test_a_package_runs_without_us(options, model, tmp_path):
    says = package(earlytom_compile.export(model, frames=FRAMES, **options), tmp_path / "video.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["video.pt2"]
    made, told = in_another_process(tmp_path / "video.pt2", videos(), tmp_path)
    by_pixels = iter(made.values())
    same_rows(lambda pixels: next(by_pixels), model, options)
    assert told.items() >= says.items()
