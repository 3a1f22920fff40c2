"""Files are tried before the work, and are whole at any time."""

import argparse
import os
import stat

import pytest

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli.comparison import Arm, Comparison, comparison_table
from earlytom_compile.cli.demo import _questions_table
from earlytom_compile.cli.gains import Cost, Gains, gains_table
from earlytom_compile.cli.main import main
from earlytom_compile.cli.outputs import check_outputs, output_console, write_text
from earlytom_compile.cli.quality import Setting, Summary, settings_table
from earlytom_compile.toyworld.questions import Question


def asked(**outputs):
    return argparse.Namespace(**{"json": None, "markdown": None, "trace": None, "plot": None, **outputs})


def test_trying_leaves_a_file_as_it_was(tmp_path):
    there, new = tmp_path / "there.json", tmp_path / "folder" / "new.json"
    there.write_text("kept")
    new.parent.mkdir()
    check_outputs(asked(json=str(there), markdown=str(new)))
    assert there.read_text() == "kept" and not list(new.parent.iterdir())
    write_text(new, "{}")
    assert new.read_text() == "{}" and os.listdir(new.parent) == ["new.json"]


@pytest.mark.parametrize("name", ["json", "html", "plot", "save"])
def test_a_folder_that_is_not_there_is_named_and_not_made(name, tmp_path):
    place = tmp_path / "typo" / "out"
    with pytest.raises(EarlyTomConfigError) as error:
        check_outputs(asked(**{name: str(place)}))
    assert str(error.value) == (
        f"{name}={str(place)!r}: there is no folder {str(place.parent)!r}; make it, or name another place."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["json", "markdown", "trace"])
def test_places_where_nothing_can_be_written(name, tmp_path):
    (tmp_path / "file").touch()
    for path, word in (
        (tmp_path, "that is a folder"),
        (tmp_path / "file" / "below", "nothing can be written there"),
        (tmp_path / ("x" * 300), "nothing can be written there"),
        ("/proc/nothing", "nothing can be written there"),
    ):
        with pytest.raises(EarlyTomConfigError, match=f"{name}=.*{word}"):
            check_outputs(asked(**{name: str(path)}))


def test_folders_are_tried_too(tmp_path):
    (tmp_path / "file").touch()
    check_outputs(asked(save=str(tmp_path / "new"), plot=str(tmp_path)))
    assert os.listdir(tmp_path) == ["file"], "what is asked for is made when there is something to put into it"
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(EarlyTomConfigError, match="save=.*nothing can be written there"):
            check_outputs(asked(save=str(path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_is_protected_is_found_first(tmp_path):
    file = tmp_path / "mine.json"
    file.touch(stat.S_IRUSR)
    with pytest.raises(EarlyTomConfigError, match="Permission denied"):
        check_outputs(asked(json=str(file)))


def test_the_standard_output_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_outputs(asked(json="-"))
    write_text("-", "{}")
    assert capsys.readouterr().out == "{}" and not list(tmp_path.iterdir())


def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    check_outputs(asked(json=os.devnull))
    write_text(os.devnull, "gone")
    assert not os.path.isfile(os.devnull)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, "first")

    def stopped(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "second")
    assert file.read_text() == "first"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--html", "VIDEO"], "that is the file of video"),
        (["--html", "one", "--json", "./one"], "that is the file of json"),
        (["--html", "-"], "name a file"),
    ],
)
def test_nothing_is_written_over_what_is_read_or_written_beside(tmp_path, capsys, monkeypatch, words, said):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"precious")
    monkeypatch.chdir(tmp_path)
    given = [str(video) if word == "VIDEO" else word for word in words]
    assert main(["run", "--model", "m", "--video", str(video), "--prompt", "what ?", *given]) == 2
    assert said in capsys.readouterr().err and video.read_bytes() == b"precious"


def test_a_video_that_is_not_there_is_missed_before_anything_is_imported(capsys, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda *args: pytest.fail("imported"))
    assert main(["run", "--model", "m", "--video", "typo.mp4", "--prompt", "what ?"]) == 2
    assert "no video file at 'typo.mp4'" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_file_for_which_there_is_no_room_is_named():
    with pytest.raises(EarlyTomConfigError, match=r"'/dev/full' cannot be written \(No space left on device\)"):
        write_text("/dev/full", "{}")


VIDEO = {"frames": [32, 24, 18, 14], "tokens": [6272, 627]}


def tables():
    """What run --compare, explain, compare and demo print, with long contents."""
    report = {"videos": [VIDEO], "prompt": [6300, 655], "inside": [], "merge_layers": [6, 21, 23], "full_layers": []}
    arms = [Arm(list(answer), "a word " * 20, 12.3, 1.2) for answer in ([1, 2, 3], [1, 2, 4])]
    costs = [Cost(tokens, tokens, 1e13, 1.2, 1 << 30, 1 << 30, 1 << 30) for tokens in (6272, 627)]
    one = Summary(Setting("plus", 0.1), 100, 90, 80, 81, 0.0123, 627.0, 6272.0, 0.3, 1.2)
    question = Question("what color is the circle ?", "blue", ("blue", "red"), "color")
    return {
        "run": comparison_table(Comparison(*arms, report, "")),
        "explain": gains_table(Gains(*costs)),
        "compare": settings_table([one]),
        "demo": _questions_table([question], [("blue", "blue")], report),
    }


@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("name", ["run", "explain", "compare", "demo"])
def test_tables_fit_a_narrow_terminal_and_lose_nothing(name, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    output_console(asked()).print(tables()[name])
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= columns and "\u2026" not in "".join(lines)


@pytest.mark.parametrize("columns, widest", [("60", 60), ("40", 40), ("0", 120), ("", 120)])
def test_tables_of_flops_are_as_wide_as_columns_says(columns, widest, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["flops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= widest and "\u2026" not in "".join(lines)
    assert output_console(asked()).width == widest
