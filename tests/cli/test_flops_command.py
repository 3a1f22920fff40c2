"""``earlytom flops`` prints the table of a shape, of a checkpoint's config.json, and refuses what makes no sense."""

import json
import re

import pytest

from earlytom_compile.cli import main as cli
from earlytom_compile.flops import Reuse, count
from earlytom_compile.shapes import shape_of


@pytest.fixture
def flops(capsys):
    def run(*arguments):
        status = cli.main(["flops", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def rows(output):
    """Cells of the tables, by the first two."""
    lines = [line.strip(" │") for line in output.splitlines() if line.startswith("│")]
    return {(name, kept): rest for name, kept, *rest in (re.split(r"\s*│\s*", line) for line in lines)}


@pytest.mark.parametrize("shape, reached", [("llava-onevision-7b", 10), ("llava-onevision-0.5b", 9)])
def test_the_papers_column_stands_beside_what_is_counted(flops, shape, reached):
    status, output, _ = flops("--shape", shape)
    assert status == 0 and "protocol paper" in output
    beside = {key: cells for key, cells in rows(output.split("imply")[0]).items() if len(cells) == 5}
    same = [key for key, (_, _, total, _, paper) in beside.items() if total == paper]
    assert len(same) == reached
    others = {method for method, _ in beside.keys() - same}
    assert others <= {"EarlyTom + inner", "HoliTom"}  # its frames are a guess; 48.945 for 49.0


def test_table_7_stands_beside_what_is_counted(flops):
    status, output, _ = flops("--shape", "qwen2.5-vl-7b", "--retain-ratio", 0.15)
    found, said = rows(output.split("imply")[0]), " ".join(output.split())
    assert status == 0 and "23,000 video tokens: 383.3 temporal patches (two pictures each) of 60" in said
    assert "As the paper's Table 7" in said
    assert found["full", "100%"][2] == found["full", "100%"][4] == "554.7"
    assert found["pooling, subsampling", "15%"][2:] == ["91.9", "16.6%", "91.9"]
    assert found["EarlyTom + inner", "15%"][4] == "67.7"  # its frames are a guess
    assert rows(output)["15%", "67.7"][0] == "27.17-27.27"
    # What nobody published is compared with nothing.
    for more in (("--frames", 768), ("--frame-size", "168x280"), ("--schedule", "384,300,200")):
        assert "67.7" not in flops("--shape", "qwen2.5-vl-7b", *more)[1]


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3.5-9b"])
def test_pictures_of_a_video_are_counted_in_temporal_patches(flops, tmp_path, name):
    file = tmp_path / "flops.json"
    asked = ("--shape", name, "--protocol", "exact", "--retain-ratio", 0.1, "--prompt-length", 20)
    status, output, _ = flops(*asked, "--frames", 767, "--json", file)
    assert status == 0 and "23,040 video tokens: 384 temporal patches" in " ".join(output.split())
    found, shape = {row["method"]: row for row in json.loads(file.read_text())["rows"]}, shape_of(name)
    beside = 20 + (2 if name == "qwen2.5-vl-7b" else 384 * 9)  # a time stamp and two marks for each
    full = count(shape, protocol="exact", frames_schedule=(384,), llm_tokens=23040 + beside)
    assert found["full"]["total"] == full.total
    merged = 384 * 0.739
    ours = count(
        shape,
        protocol="exact",
        frames_schedule=(384, *[merged] * len(shape.merges(None))),
        llm_tokens=2304 + beside,
    )
    assert found["EarlyTom"]["total"] == ours.total

    larger = flops(*asked, "--frames", 768, "--frame-size", f"{24 * shape.patch_size}x{40 * shape.patch_size}")[1]
    assert "92,160 video tokens: 384 temporal patches (two pictures each) of 240" in " ".join(larger.split())


def test_merge_layers_of_a_tower_with_windows_are_those_that_see_the_frame(flops):
    assert "merged after encoder layers 7, 23" in " ".join(flops("--shape", "qwen2.5-vl-7b")[1].split())
    assert "merged after encoder layers 6, 21, 23" in " ".join(flops("--shape", "qwen3-vl-8b")[1].split())


def test_what_earlytoms_totals_imply(flops):
    _, output, _ = flops()
    found = rows(output)
    encoder, even, *ranges = found["all", ""]
    assert encoder == "29.42-29.44" and even == "26.2-26.2" and len(ranges) == 3
    assert found["25%", "36.5"]
    assert "imply" not in flops("--frames", 16)[1]  # the paper says nothing about it
    assert "imply" not in flops("--protocol", "exact")[1]
    status, output, _ = flops("--merge-layers", "20,21,23")
    assert status == 0 and "out of reach" in output and "imply" not in output


def test_a_schedule_is_counted_and_written(flops, tmp_path):
    file = tmp_path / "flops.json"
    status, output, _ = flops(
        "--protocol", "exact", "--schedule", "32,27,22,19", "--retain-ratio", 0.1, "--prompt-length", 37, "--json", file
    )
    assert status == 0 and "protocol exact" in output and "32 -> 27 -> 22 -> 19" in output
    expected = count(
        shape_of("llava-onevision-7b"), protocol="exact", frames_schedule=(32, 27, 22, 19), llm_tokens=627 + 1 + 37
    )
    content = json.loads(file.read_text())
    (row,) = (row for row in content["rows"] if row["method"] == "EarlyTom")
    assert content["protocol"] == "exact" and content["merge_layers"] == [6, 21, 23]
    assert row["total"] == expected.total and row["flops"]["encoder"] == expected.encoder
    full = next(row for row in content["rows"] if row["method"] == "full")
    assert row["share_of_full"] == row["total"] / full["total"] and full["share_of_full"] == 1


@pytest.mark.parametrize("protocol", ["paper", "exact"])
def test_reused_patches_have_rows_of_their_own_where_somebody_says_how_many(flops, tmp_path, protocol):
    file = tmp_path / "flops.json"
    shape, frames = shape_of("llava-onevision-0.5b"), 8
    asked = ("--shape", "llava-onevision-0.5b", "--frames", frames, "--retain-ratio", 0.1, "--protocol", protocol)
    assert "EarlyTom plus" not in flops(*asked)[1]
    status, output, _ = flops(*asked, "--encode-ratio", 0.25, "--full-layers", "20,25", "--json", file)
    said = " ".join(output.split())
    assert status == 0 and "1,458 of 5,832 patches (25.0%)" in said and "in encoder layers 20, 25;" in said
    (row,) = (row for row in json.loads(file.read_text())["rows"] if row["method"] == "EarlyTom plus")
    tokens = 157 + (33 if protocol == "exact" else 0)
    reuse = Reuse(1458, (20, 25))
    given = {"protocol": protocol, "frames_schedule": (frames,), "llm_tokens": tokens, "variant": "plus"}
    assert row["total"] == count(shape, **given, reuse=reuse).total
    assert row["flops"]["encoder"] < 0.35 * count(shape, **given).encoder
    assert flops(*asked, "--computed", 1458, "--full-layers", "20,25")[1] == output
    default = flops(*asked, "--encode-ratio", 0.01)[1]
    assert "729 of 5,832 patches (12.5%)" in " ".join(default.split())  # the first frame, at least


@pytest.mark.parametrize("name, method", [("VisionZip", "visionzip"), ("HoliTom", "holitom")])
def test_exact_rows_have_what_a_method_multiplies_to_choose(flops, tmp_path, name, method):
    file = tmp_path / "rows.json"
    status, *_ = flops("--protocol", "exact", "--retain-ratio", 0.2, "--frames", 8, "--json", file)
    found = {row["method"]: row["flops"] for row in json.loads(file.read_text())["rows"]}
    given = {"protocol": "exact", "frames_schedule": (8,), "llm_tokens": 1}
    expected = count(shape_of("llava-onevision-7b"), **given, method=method, kept=round(0.2 * 8 * 196))
    assert status == 0 and found[name]["operators"] == expected.operators > found["full"]["operators"] == 0
    assert found[name]["encoder"] == found["full"]["encoder"]


def test_a_checkpoint_needs_only_its_config(flops, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    status, output, _ = flops("--model", tmp_path, "--frames", 8, "--protocol", "exact")
    assert status == 0 and "8 frames" in " ".join(output.split())
    assert ("EarlyTom", "10%") in rows(output)
    assert ("HoliTom", "10%") not in rows(output)  # no layer 18 to merge before


def test_mistakes_exit_with_2_and_one_line(flops, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    cases = {
        "no shape 'llava'": flops("--shape", "llava"),
        "no checkpoint folder at": flops("--model", tmp_path / "nowhere"),
        "no checkpoint folder at 'nowhere'": flops("--model", "nowhere"),
        "shape='cpu-tiny' with --model": flops("--shape", "cpu-tiny", "--model", tmp_path),
        "prompt_length=9 with --protocol paper": flops("--prompt-length", 9),
        "of the family 'qwen2_vl'": flops("--model", tmp_path),
        "must start with the 32 frames": flops("--frames", 32, "--schedule", "16,8,8,8"),
        "one number for each of": flops("--schedule", "32,16"),
        "never grow": flops("--schedule", "32,16,20,8"),
        "frames=0": flops("--frames", 0),
        "prompt_length=-1": flops("--prompt-length", -1, "--protocol", "exact"),
        "retain_ratio=2.0": flops("--retain-ratio", 2),
        "layer 30 does not exist": flops("--merge-layers", "6,30"),
        "encode_ratio=0.5 with --computed 900": flops("--encode-ratio", 0.5, "--computed", 900),
        "encode_ratio=1.5: must be": flops("--encode-ratio", 1.5),
        "full_layers=(25,) without --encode-ratio": flops("--full-layers", "25"),
        "layer 26 does not exist": flops("--encode-ratio", 0.5, "--full-layers", "26"),
        "100 computed patches: must be from 729": flops("--computed", 100),
        "frame_size=168x280: pictures of this model have one size": flops("--frame-size", "168x280"),
        "frame_size=100x280: height and width must be multiples of 28": flops(
            "--shape", "qwen2.5-vl-7b", "--frame-size", "100x280"
        ),
    }
    for message, (status, _, errors) in cases.items():
        assert status == 2, message
        assert message in errors and "Traceback" not in errors
    assert "repo" not in "".join(errors for _, _, errors in cases.values())
