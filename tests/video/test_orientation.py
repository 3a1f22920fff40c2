"""A frame is shown as its display matrix says, which is how FFmpeg's own programs show it."""

import numpy as np
import pytest
from effort import examples
from films import decode_everything, turn, write_film
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.integrations.orientation import upright
from earlytom_compile.integrations.video import read_video

QUARTERS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


def placed(picture, a, b, c, d):
    """Every pixel by itself: (x, y) -> (ax + cy, bx + dy), and then all moved to begin at (0, 0)."""
    height, width = picture.shape[:2]
    places = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(height) for x in range(width)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    shown = np.empty((height, width, 3) if a else (width, height, 3), np.uint8)
    for (x, y), pixel in places.items():
        shown[y - top, x - left] = pixel
    return shown


@pytest.mark.parametrize("matrix", QUARTERS + MIRRORED)
def test_every_pixel_goes_where_the_matrix_says(matrix):
    picture = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    a, b, c, d = (number << 16 for number in matrix)
    assert np.array_equal(upright(picture, (a, b, 0, c, d, 0, 0, 0, 1 << 30)), placed(picture, *matrix))


@examples(40)
@given(angle=st.integers(-180, 180).filter(lambda angle: angle % 90 != 45), mirror=st.booleans())
def test_other_angles_are_turned_to_the_nearest_quarter(angle, mirror):
    picture = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    turned = np.round(65536 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])).astype(int)
    side = -1 if mirror else 1
    matrix = (side * turned[0], turned[1], 0, side * -turned[1], turned[0], 0, 0, 0, 1 << 30)
    a, b, c, d = QUARTERS[round(angle / 90) % 4]
    assert np.array_equal(upright(picture, matrix), placed(picture, side * a, b, side * c, d))


@pytest.mark.parametrize("matrix", QUARTERS + MIRRORED)
def test_a_phone_s_video_is_read_upright(tmp_path, matrix):
    path = turn(write_film(tmp_path / "phone.mp4", 30), matrix)
    everything = decode_everything(path)
    video = read_video(path, 4)
    for picture, index in zip(video.pixels, video.indices, strict=True):
        assert np.array_equal(picture, placed(everything[index], *matrix))


def test_frames_are_turned_before_they_are_resized(tmp_path):
    path = turn(write_film(tmp_path / "phone.mp4", 5), (0, 1, -1, 0))
    shapes = []
    read_video(path, 2, resize=lambda frame: shapes.append(frame.shape) or frame)
    assert shapes == [(64, 48, 3)] * 2


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_phone_s_photo_is_read_upright(tmp_path, kind, orientation):
    image, photo, lossless = pytest.importorskip("PIL.Image"), tmp_path / f"photo.{kind}", kind != "jpg"
    # Quarters of one colour each, which JPEG keeps, and a camera's words beside the orientation.
    corners = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [200, 200, 200]]], np.uint8)
    picture = image.fromarray(corners.repeat(32, 0).repeat(48, 1))
    words = picture.getexif()
    words[0x010F] = "a camera"
    if orientation is not None:
        words[0x0112] = orientation
    picture.save(photo, exif=words, **({} if lossless else {"quality": 95, "subsampling": 0}))
    from PIL import ImageOps

    shown = np.asarray(ImageOps.exif_transpose(image.open(photo)).convert("RGB")).astype(int)
    (read,) = read_video(photo, 1).pixels.astype(int)
    assert read.shape == shown.shape
    assert np.abs(read - shown).max() <= (0 if lossless else 8)
