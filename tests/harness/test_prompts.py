"""What tasks hand over for a sample, and what is refused."""

import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

from earlytom_compile import EarlyTomConfigError  # noqa: E402
from earlytom_compile.integrations.lmms_eval.prompts import Film, Picture, Turn, from_messages, from_visuals  # noqa: E402


def picture(shade=0, mode="RGB"):
    return Image.new(mode, (4, 3), shade)


def kinds(turn):
    """Text as it is, P for a picture, the path of a video."""
    names = {Picture: lambda part: "P", Film: lambda part: part.source, str: lambda part: part}
    return [names[type(part)](part) for part in turn.parts]


@pytest.mark.parametrize(
    "context, visuals, parts",
    [
        ("who?", None, ["who?"]),
        ("who?", [], ["who?"]),
        ("who?", ["a.mp4"], ["a.mp4", "who?"]),
        ("who?", "a.mp4", ["a.mp4", "who?"]),
        ("who?", ["a.mp4", picture()], ["a.mp4", "P", "who?"]),
        ("<image>\nwho?", ["a.mp4"], ["a.mp4", "\nwho?"]),
        ("is <image> in <video>?", [picture(), "a.mp4"], ["is ", "P", " in ", "a.mp4", "?"]),
        ("what is <image 1>?", [picture()], ["P", "what is <image 1>?"]),
        ("<image>?", [picture(), picture()], ["P", "P", "<image>?"]),  # the model's side refuses it
    ],
)
def test_simple_tasks(context, visuals, parts):
    (turn,) = from_visuals(context, visuals, {})
    assert turn.role == "user" and kinds(turn) == parts


def test_frames_that_are_one_video():
    frames = [picture((10 * number, 0, 0)) for number in range(9)]
    (turn,) = from_visuals("what?", frames, {"task_type": "video", "sample_frames": 3})
    film, text = turn.parts
    assert text == "what?" and [frame.getpixel((0, 0))[0] for frame in film.source] == [0, 40, 80]
    assert kinds(from_visuals("what?", frames, {})[0]) == ["P"] * 9 + ["what?"]
    (turn,) = from_visuals("what?", frames[:2], {"task_type": "video", "sample_frames": 32})
    assert len(turn.parts[0].source) == 2
    (turn,) = from_visuals("what?", [frames], {})
    assert len(turn.parts[0].source) == 9


def test_chat_tasks(tmp_path):
    picture((1, 2, 3)).save(tmp_path / "a.png")
    turns = from_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "video", "url": "a.gif"}, {"type": "text", "text": "who?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Ann"}]},
            {"role": "user", "content": [{"type": "image", "url": str(tmp_path / "a.png")}]},
            {"role": "user", "content": [{"type": "video", "url": [picture(), picture()]}]},
        ]
    )
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "user"]
    assert [kinds(turn) for turn in turns[:4]] == [["be brief"], ["a.gif", "who?"], ["Ann"], ["P"]]
    assert turns[3].parts[0].image.getpixel((0, 0)) == (1, 2, 3) and len(turns[4].parts[0].source) == 2


def test_pictures_are_rgb():
    (turn,) = from_visuals("", [picture((1, 2, 3, 4), "RGBA"), picture(7, "L")], {})
    assert [part.image.mode for part in turn.media()] == ["RGB", "RGB"]


@pytest.mark.parametrize(
    "parts, first",
    [(("a",), True), ((Film("a"), "a"), True), (("a", Film("a")), False), ((Film("a"), "b", Film("c")), False)],
)
def test_whether_text_comes_last(parts, first):
    assert Turn("user", parts).media_first() is first


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda: from_visuals("", [{"array": [0.1], "sampling_rate": 16000}], {}), "the task shows a dict: .*sound"),
        (lambda: from_visuals("", [{"url": "a.mp4", "video_start": 3}], {}), "a part of a video cannot be read"),
        (lambda: from_visuals("", [7], {}), "the task shows a int"),
        (lambda: from_visuals("", [[]], {}), "the task shows a list"),
        (lambda: from_visuals("", ["a.png"], {}), "'a.png' cannot be read as a picture"),
        (lambda: from_visuals("", ["a.mp4"], {"task_type": "video", "sample_frames": 4}), "not all pictures"),
        (lambda: from_visuals("", [], {"task_type": "video", "sample_frames": 4}), "shows 0 thing"),
        (lambda: from_visuals("", [picture()], {"task_type": "video", "sample_frames": 0}), "sample_frames=0: must be"),
        (lambda: from_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]), "'audio': must be"),
        (lambda: from_messages([{"role": "user", "content": [{"type": "image", "url": [picture()]}]}]), "an image"),
    ],
)
def test_what_cannot_be_shown_is_said(ask, says):
    with pytest.raises(EarlyTomConfigError, match=says):
        ask()
