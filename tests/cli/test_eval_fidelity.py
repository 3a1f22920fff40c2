"""``earlytom eval --fidelity``: which rows, files and plots, going on after Ctrl-C, and what is refused."""

import json

import pytest
import torch
from shared_towers import share_towers
from transformers import CLIPConfig, CLIPModel, SiglipVisionConfig, SiglipVisionModel

from earlytom_compile.benchmarks import fidelity, pretrained
from earlytom_compile.cli.main import main

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
LAYERS = 5
SETTINGS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def write_encoder(folder, settings=SETTINGS):
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES, num_hidden_layers=LAYERS, vision_use_head=False))
    model.save_pretrained(folder)
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def words(encoder, clip):
    """Of a small run: one merging, two thresholds and a budget with two sets of layers."""
    where = ["--model", encoder, "--video", clip, "--frames", "8", "--device", "cpu"]
    reuse = ["--tau-reuses", "0.02,0.1", "--encode-ratios", "0.5", "--full-layer-sets", "last1,none"]
    return ["eval", "--fidelity", *where, "--tau-segs", "0.6", *reuse]


@pytest.fixture
def traced_once(one_trace, monkeypatch):
    """All encoders of a command trace the tower together."""
    share_towers(one_trace, monkeypatch)


@pytest.fixture
def stand_in(monkeypatch):
    """Measures nothing: rows are made up. ``stand_in.stop_at`` is where Ctrl-C comes."""

    class Measured(list):
        stop_at: int | None = None

    measured = Measured()

    def measure(tower, encode, clip, pixels, full, arm):
        if len(measured) == measured.stop_at:
            raise KeyboardInterrupt
        measured.append((clip, *arm.key))
        cost = 0.5 + 0.01 * len(measured)
        return fidelity.Row(clip, arm.method, arm.setting, arm.full_layers, cost, 0.9 + cost / 20, 0.8, 0.7)

    monkeypatch.setattr(fidelity, "measure", measure)
    monkeypatch.setattr(fidelity, "compiled", lambda tower, arm: None)
    return measured


@pytest.mark.usefixtures("traced_once")
def test_a_real_run_writes_the_same_numbers_everywhere(words, clip, tmp_path, earlytom):
    files = ["--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md", "--plot", tmp_path / "plots"]
    short = [word for word in words if word not in ("--encode-ratios", "0.5", "last1,none", "--full-layer-sets")]
    status, out, err = earlytom(*short, "--full-layer-sets", "default", "--encode-ratios", "0.5", *files)
    assert status == 0, err
    content = json.loads((tmp_path / "a.json").read_text())
    rows = content["rows"]
    assert [(row["clip"], row["method"], row["setting"]) for row in rows] == [
        (clip.stem, "paper", "tau_seg 0.6"),
        (clip.stem, "reuse", "tau_reuse 0.02"),
        (clip.stem, "reuse", "tau_reuse 0.1"),
        (clip.stem, "reuse", "encode_ratio 0.5"),
    ]
    assert rows[1]["cost"] >= rows[2]["cost"] and all(0 < row["cost"] <= 1 for row in rows)
    assert all(0.5 < row["worst_frame"] <= row["cosine"] <= 1 + 1e-6 for row in rows)
    assert (tmp_path / "plots" / "fidelity.png").stat().st_size > 5000 and "wrote" in out
    markdown = (tmp_path / "a.md").read_text()
    for row in rows:
        number = f"{row['cosine']:.4f}"
        assert number in out and number in markdown and f"{row['cost']:.3f}" in markdown
    assert "(default)" in out and [each["setting"] for each in content["equal fidelity"]] == ["tau_seg 0.6"]
    assert content["frames"] == 8 and content["model"] == str(words[3])


def test_every_setting_with_every_set_of_layers_and_nothing_twice(stand_in, words, clip, earlytom):
    assert earlytom(*words[:-1], "last1,4,none")[0] == 0
    settings = ["tau_reuse 0.02", "tau_reuse 0.1", "encode_ratio 0.5"]
    expected = [("paper", "tau_seg 0.6", ()), *(("reuse", each, layers) for layers in ((4,), ()) for each in settings)]
    assert stand_in == [(clip.stem, *each) for each in expected]


def test_ctrl_c_saves_finished_rows_and_resume_measures_the_rest(stand_in, words, tmp_path, earlytom):
    file = tmp_path / "a.json"
    stand_in.stop_at = 3
    status, _, err = earlytom(*words, "--json", file)
    assert status == 130 and f"stopped: {file} has 3 of 7 rows;" in " ".join(err.split())
    saved = json.loads(file.read_text())["rows"]
    stand_in.stop_at = None
    assert earlytom(*words, "--json", file, "--resume")[0] == 0
    assert len(stand_in) == len(set(stand_in)) == 7
    assert json.loads(file.read_text())["rows"][:3] == saved
    # Fewer rows are shown, and the file keeps the others.
    status, out, _ = earlytom(*words[:-1], "none", "--json", file, "--resume")
    assert status == 0 and "none" in out and len(json.loads(file.read_text())["rows"]) == 7 and len(stand_in) == 7
    status, _, err = earlytom(*(word if word != "8" else "6" for word in words), "--json", file, "--resume")
    assert status == 2 and "frames=8, and this would be frames=6" in " ".join(err.split())


def test_files_of_one_name_are_not_mistaken_for_each_other(stand_in, words, clip, tmp_path, earlytom):
    file, other = tmp_path / "a.json", tmp_path / clip.name
    other.write_bytes(clip.read_bytes())
    assert earlytom(*words, "--json", file)[0] == 0
    status, _, err = earlytom(*(other if word == clip else word for word in words), "--json", file, "--resume")
    assert status == 2 and "rows of both do not belong into one table" in " ".join(err.split())


@pytest.mark.usefixtures("traced_once")
def test_half_precision(words, earlytom):
    short = [word for word in words if word not in ("--encode-ratios", "0.5", "0.02,0.1", "--tau-reuses")]
    status, out, err = earlytom(*short[:-1], "last1", "--tau-reuses", "0.1", "--dtype", "bfloat16")
    assert status == 0 and "tau_reuse 0.1" in out, err


def test_json_to_the_standard_output_is_json_alone(stand_in, words, earlytom):
    status, out, err = earlytom(*words, "--json", "-")
    assert status == 0 and len(json.loads(out)["rows"]) == 7 and "beside the full encoder" in err


def test_several_videos_are_told_apart_by_name(stand_in, words, clip, tmp_path, monkeypatch, earlytom):
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    monkeypatch.setattr(pretrained, "clip_file", lambda name: {"carphone": clip}[name])
    assert earlytom(*words, "--video", other, "--video", "carphone")[0] == 0
    assert list(dict.fromkeys(name for name, *_ in stand_in)) == [clip.stem, "other", "carphone"]
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "other.mp4"
    again.write_bytes(b"")
    status, _, err = earlytom(*words, "--video", other, "--video", again)
    assert status == 2 and "two of them are called 'other'" in err


def test_the_encoder_inside_a_larger_model_is_taken(stand_in, words, clip, tmp_path, earlytom):
    vision, text = {**SIZES, "num_hidden_layers": 3}, {"hidden_size": 16, "num_hidden_layers": 1}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "do_center_crop": True}))
    asked = [tmp_path if word == words[3] else word for word in words]
    assert earlytom(*asked)[0] == 0
    assert ("reuse", "tau_reuse 0.02", (2,)) in [each[1:] for each in stand_in]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--toy"], "give one of --toy"),
        (["--retain-ratios", "0.1"], "retain_ratios=(0.1,): that goes with --toy and --tasks"),
        (["--variant", "plus"], "variant='plus': that goes with --toy and --tasks"),
        (["--limit", "3"], "limit=3: that goes with --tasks"),
        (["--tau-seg", "0.5"], "tau_seg=0.5: --fidelity compares several settings in one table; give --tau-segs"),
        (["--alpha", "0.5"], "one table; leave it out"),
        (["--full-layer-sets", "last6"], "last6, but the encoder has 5 layers"),
        (["--full-layer-sets", "2+5"], "layer 5 does not exist"),
        (["--encode-ratios", "1.5"], "encode_ratio=1.5"),
        (["--tau-reuses", "-1"], "tau_reuse=-1.0"),
        (["--frames", "0"], "frames=0"),
        (["--resume"], "--resume without --json FILE"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(more, says, stand_in, encoder, clip, earlytom):
    status, _, err = earlytom("eval", "--fidelity", "--model", encoder, "--video", clip, *more)
    assert status == 2 and says in " ".join(err.split()) and stand_in == []


@pytest.mark.parametrize("word", ["last0", "last", "1,,2", "a", "-1", "1.5"])
def test_words_that_are_no_set_of_layers(word, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--fidelity", f"--full-layer-sets={word}"])
    assert ended.value.code == 2 and "must be default, none, last1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--fidelity", "--video", "nowhere.mp4"], "no video file at 'nowhere.mp4'"),
        (["--toy", "--tau-segs", "0.5"], "tau_segs=(0.5,): that goes with --fidelity"),
        (["--toy", "--video", "carphone"], "earlytom eval --fidelity"),
    ],
)
def test_what_belongs_elsewhere(words, says, earlytom):
    status, _, err = earlytom("eval", *words)
    assert status == 2 and says in " ".join(err.split())


def test_a_missing_package_is_named(stand_in, monkeypatch, earlytom):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    for words in ([], ["--video", "bikes"]):
        status, _, err = earlytom("eval", "--fidelity", *words)
        assert status == 2 and "pip install 'earlytom-compile[fidelity]'" in " ".join(err.split()) and stand_in == []


@pytest.mark.parametrize(
    "broken, says",
    [
        (lambda folder: write_encoder(folder, settings=None), "has no preprocessor_config.json"),
        (lambda folder: (write_encoder(folder) / "config.json").write_text("{}"), "no config.json"),
        (lambda folder: (write_encoder(folder) / "model.safetensors").unlink(), "has no weights"),
    ],
)
def test_a_checkpoint_that_is_none(broken, says, stand_in, clip, tmp_path, earlytom):
    broken(tmp_path)
    status, _, err = earlytom("eval", "--fidelity", "--model", tmp_path, "--video", clip)
    assert status == 2 and says in " ".join(err.split()) and stand_in == []
