"""The programs of examples/ run, take the frames that the checkpoint was made for, and show what README leads with."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile.integrations import video

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize(
    "name, questions", [("generate", ["What?"]), ("forward", ["What?"]), ("follow_up", ["What?", "And then?"])]
)
def test_an_example(name, questions, model, checkpoint, clip, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    settings = folder / "video_preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_frames": 5}))
    compiled, taken = [], []
    in_place, plain, read_video = earlytom_compile.compile, torch.compile, video.read_video

    def uncompiled(model, **options):  # what Inductor makes of it is others' business
        compiled.append(options)
        return in_place(model, **options, lowering="eager")

    def uncompiled_too(model, *, backend, options=None):
        if backend != "earlytom":  # how the first one compiles
            return plain(model, backend=backend)
        compiled.append(options)
        return plain(model, backend=backend, options={**options, "lowering": "eager"})

    def noted(*arguments, **options):
        taken.append(read_video(*arguments, **options))
        return taken[-1]

    as_it_was = earlytom_compile.restore(model)  # traced once for all that compile it in place
    monkeypatch.setattr(type(model), "from_pretrained", lambda folder: as_it_was)
    monkeypatch.setattr(earlytom_compile, "compile", uncompiled)
    monkeypatch.setattr(torch, "compile", uncompiled_too)
    monkeypatch.setattr(video, "read_video", noted)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(folder), str(clip), *questions)

    assert compiled[0] == {"retain_ratio": 0.1}
    assert [frames.pixels.shape for frames in taken] == [(5, 48, 48, 3)]  # resized as they are read
    assert capsys.readouterr().out
