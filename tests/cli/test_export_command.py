"""``earlytom export``: what it refuses before anything is read, and a package made of a checkpoint."""

import pytest
import torch


@pytest.mark.parametrize(
    "words, said",
    [
        (["-o", "video.zip"], "'video.zip': the name of a package must end in .pt2."),
        (["-o", "none/video.pt2"], "output='none/video.pt2': there is no folder 'none'"),
        (["-o", "video.pt2", "--variant", "released"], "variant='released' cannot be exported"),
        (["-o", "video.pt2", "--variant", "plus", "--tau-merge", "0.5"], "no frames merge where unchanged patches"),
        (["-o", "video.pt2", "--merge-layers", "9"], 'with variant="plus", the default, which reuses patches'),
        (["-o", "video.pt2", "--variant", "paper", "--merge-layers", "9"], "layer 9 does not exist"),
    ],
)
def test_refuses_what_it_cannot_do(earlytom, checkpoint, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, printed, beside = earlytom("export", "--model", checkpoint, *words)
    assert (status, printed) == (2, "") and said in beside
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--method", "--lowering", "--mode", "--encode-ratio", "--strict"])
def test_has_no_options_that_a_program_cannot_have(earlytom, flag, capsys):
    with pytest.raises(SystemExit):
        earlytom("export", "--model", "m", "-o", "video.pt2", flag, "1")
    assert f"unknown option {flag}" in capsys.readouterr().err


@pytest.mark.long
def test_writes_a_package_and_says_what_it_takes_and_gives(earlytom, checkpoint, tmp_path):
    file = tmp_path / "video.pt2"
    status, printed, _ = earlytom("export", "--model", checkpoint, "--frames", 6, "--retain-ratio", 0.1, "-o", file)
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if not line.startswith("made with"))
    assert lines["file"].startswith(f"{file}, ") and lines["file"].endswith("for torch._inductor.aoti_load_package()")
    assert lines["model"] == "LlavaOnevisionForConditionalGeneration, videos of 6 pictures"
    assert lines["takes"] == "pixel_values_videos float32 [1, 6, 3, 48, 48] on cpu"
    assert lines["gives"] == "rows float32 [6, 64] on cpu"
    assert "retain_ratio=0.1" in lines["options"]
    rows = torch._inductor.aoti_load_package(str(file))(torch.randn(1, 6, 3, 48, 48))
    assert rows.shape == (6, 64) and rows.isfinite().all()
