"""Reuse: what counts as a change of a patch, and what noise explains."""

import math

import brute_force_reuse
import pytest
import torch

from earlytom_compile.reference import plan_reuse


def change_of(before, after):
    """Of one patch, ``[C, height, width]`` each."""
    plan = plan_reuse(torch.stack([before, after]), (1, 1), before.shape[1:], budget=2)
    return plan.change[1, 0].item()


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 7))])
def test_a_quarter_of_a_channel_is_enough(rows, columns):
    """5 x 7 pixels are cut behind 2 rows and 3 columns."""
    before = torch.zeros(3, 5, 7)
    after = before.clone()
    after[1, rows, columns] = -0.5
    assert change_of(before, after) == 0.5
    after[1, rows, columns] = 0.0
    after[1, rows.start, columns.start] = 6.0
    assert change_of(before, after) == 6.0 / ((rows.stop - rows.start) * (columns.stop - columns.start))


@pytest.mark.parametrize("patch", [(1, 4), (4, 1), (1, 1)])
def test_a_side_of_one_pixel_is_not_cut(patch):
    before, after = torch.zeros(1, *patch), torch.zeros(1, *patch)
    after[0, 0, 0] = 1.0
    assert change_of(before, after) == 1.0 / max(1, max(patch) // 2)


def test_of_pixels_that_change_within_quarters_a_third_counts():
    """Signs that change places within a quarter leave its mean; all pixels differ by 2."""
    board = (torch.arange(4)[:, None] + torch.arange(6)).remainder(2).mul(2.0).sub(1.0).expand(3, -1, -1)
    assert change_of(board[:, :, :4], -board[:, :, :4]) == pytest.approx(2 / 3)
    both = -board[:, :, :4].clone()
    both[:, :2, :2] += 1.0
    assert change_of(board[:, :, :4], both) == 1.0, "the larger of the two, not their sum"


def smooth(height, width, generator):
    coarse = torch.randn(1, 3, height // 20, width // 20, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]


def textured(frames, generator):
    """A still picture of 6 x 6 patches of 14 x 14."""
    return smooth(84, 84, generator).expand(frames, -1, -1, -1).clone()


def test_text_that_scrolls_within_a_patch_is_computed_again():
    """Seven lines, once in each half of the patch, that come in again above as they go out below: no mean moves."""
    generator = torch.Generator().manual_seed(3)
    pixels = textured(5, generator)
    line = torch.where(torch.rand(14, generator=generator) < 0.5, -1.0, 1.0)
    text = torch.stack([line, -line] * 3 + [torch.zeros(14)])  # [7, 14], twice in a patch
    for f in range(5):
        pixels[f, :, 28:42, 14:28] = text.roll(f, 0).repeat(2, 1)
    halves = pixels[:, :, 28:42, 14:28].unflatten(2, (2, 7)).unflatten(4, (2, 7)).mean((3, 5))
    assert torch.allclose(halves, halves[:1], atol=1e-6)
    plan = plan_reuse(pixels, (6, 6), (14, 14), tau_reuse=0.06)
    scrolling = 2 * 6 + 1
    assert plan.active[:, scrolling].all() and (plan.change[1:, scrolling] > 0.2).all()
    still = [p for p in range(36) if p != scrolling]
    assert (plan.change[1:, still] == 0).all()


def test_fine_texture_that_trembles_is_not_computed_again_but_light_is():
    """The same mean absolute difference in two patches: from pixel to pixel, and of a quarter that becomes brighter."""
    generator = torch.Generator().manual_seed(4)
    pixels = textured(2, generator)
    board = (torch.arange(14)[:, None] + torch.arange(14)).remainder(2).mul(2.0).sub(1.0)
    pixels[1, :, :14, :14] += 0.1 * board
    pixels[1, :, 14:21, 14:21] += 0.4
    plan = plan_reuse(pixels, (6, 6), (14, 14), tau_reuse=0.06, budget=37)
    assert plan.active[1].nonzero().flatten().tolist() == [7]
    assert plan.change[1, 0].item() == pytest.approx(0.1 / 3) and plan.change[1, 7].item() == pytest.approx(0.4)
    assert (pixels[1] - pixels[0]).abs()[:, :14, :14].mean() == pytest.approx(0.1)
    assert (pixels[1] - pixels[0]).abs()[:, 14:28, 14:28].mean() == pytest.approx(0.1)


# --- Noise ----------------------------------------------------------------------------------------


def noise_of(pixels, patch=14):
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    return plan_reuse(pixels, grid, (patch, patch), tau_reuse=0.0).noise


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_white_noise_is_measured(sigma):
    """2 sigma / sqrt(pi) is the mean absolute difference of two samples."""
    generator = torch.Generator().manual_seed(0)
    pixels = smooth(84, 84, generator) + sigma * torch.randn(6, 3, 84, 84, generator=generator)
    assert noise_of(pixels) == pytest.approx(2 * sigma / math.sqrt(math.pi), rel=0.02)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_still_picture_with_noise_is_computed_once(sigma, prefix):
    generator = torch.Generator().manual_seed(0)
    pixels = textured(6, generator) + sigma * torch.randn(6, 3, 84, 84, generator=generator)
    plan = plan_reuse(pixels, (6, 6), (14, 14), prefix=prefix, tau_reuse=0.06)
    assert plan.computed == 36 + 6 * prefix
    assert plan.change[1:, prefix:].max() > 0.5 * sigma, "there was noise"


def test_the_threshold_has_four_deviations_of_a_quarter_in_quadrature():
    """Of 3 x 5 pixels; one in each 2 x 2 block of a picture of zeros and ones changes by 1 / 4."""
    picture = (torch.arange(12) >= 6).float()[:, None].expand(12, 10)
    dots = torch.zeros(12, 10)
    dots[::2, ::2] = 0.25
    pixels = torch.stack([picture, picture + dots, picture])[:, None]
    plan = plan_reuse(pixels, (2, 1), (6, 10), tau_reuse=0.25)
    assert plan.noise == 0.125
    sigma = 0.125 * math.sqrt(math.pi) / 2
    assert plan.threshold == pytest.approx(math.sqrt(0.25**2 + (4 * sigma * math.sqrt(2 / 15)) ** 2), rel=1e-6)


@pytest.mark.parametrize("patch", [(26, 24), (26, 26), (40, 40)])
def test_large_quarters_do_not_hide_the_noise_of_pixels(patch):
    """Of 157 pixels and more four deviations of their means are less than what all pixels differ by; a third counts."""
    generator = torch.Generator().manual_seed(9)
    pixels = smooth(80, 80, generator) + 0.05 * torch.randn(3, 3, 80, 80, generator=generator)
    arguments = {"pixels": pixels, "grid": (80 // patch[0], 80 // patch[1]), "patch": patch}
    plan = plan_reuse(**arguments)
    quarter = patch[0] * patch[1] // 4
    share = 4 * math.sqrt(math.pi / (2 * quarter)) if quarter < 157 else 0.4
    assert plan.noise > 0.05 and plan.threshold == pytest.approx(share * plan.noise, rel=1e-6)
    assert plan.computed == plan.source.shape[1] and plan.change[1:].min() > 0.3 * plan.noise
    assert (plan.noise, plan.threshold) == brute_force_reuse.plan(**arguments)[2:]


def test_noise_does_not_hide_what_changes():
    """A change of twice the threshold is found through noise that changes every pixel by more than that."""
    generator = torch.Generator().manual_seed(5)
    pixels = textured(6, generator)
    pixels[3:, :, 42:56, 42:56] += 0.12
    pixels += 0.1 * torch.randn(6, 3, 84, 84, generator=generator)
    plan = plan_reuse(pixels, (6, 6), (14, 14), tau_reuse=0.06)
    assert plan.change[3, 21] > plan.threshold >= plan.change[1:3].max()
    assert plan.source[3:, 21].tolist() == [3, 3, 3]


def test_noise_is_measured_where_something_moves():
    """A third of the picture has other content in every frame; the quieter half says what the noise is."""
    generator = torch.Generator().manual_seed(1)
    pixels = smooth(84, 84, generator) + 0.05 * torch.randn(6, 3, 84, 84, generator=generator)
    quiet = noise_of(pixels)
    pixels[:, :, :28] = torch.randn(6, 3, 28, 84, generator=generator)
    assert quiet <= noise_of(pixels) < 1.1 * quiet


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("patch", [2, 14])
def test_frames_that_have_nothing_in_common_are_not_noise(scale, patch):
    """They look like white noise: blocks say 2 / sqrt(pi) of their deviation, which is more than half of it."""
    generator = torch.Generator().manual_seed(6)
    pixels = scale * torch.randn(5, 3, 4 * patch, 4 * patch, generator=generator)
    plan = plan_reuse(pixels, (4, 4), (patch, patch), tau_reuse=0.06 * scale)
    assert plan.noise == 0.0 and plan.active.all()


def test_noise_as_loud_as_half_the_picture_is_the_last_that_counts():
    """Its deviation counts inside the grid alone."""
    generator = torch.Generator().manual_seed(7)
    grain = torch.randn(6, 3, 90, 90, generator=generator)
    stripes = torch.where(torch.arange(90) % 28 < 14, -1.0, 1.0).expand(3, 90, -1)
    for sigma, heard in ((0.4, True), (0.6, False)):
        pixels = stripes + sigma * grain
        pixels[:, :, 84:] = pixels[:, :, :, 84:] = 1000.0
        expected = 2 * sigma / math.sqrt(math.pi)
        assert heard == (expected < 0.5 * math.sqrt(1 + sigma**2))
        assert noise_of(pixels) == (pytest.approx(expected, rel=0.02) if heard else 0.0)


def test_light_and_a_smooth_pan_are_not_noise():
    """But they are changes, of every place: a pan, and light that grows by more than the threshold."""
    generator = torch.Generator().manual_seed(2)
    wide = smooth(84, 120, generator)
    pan = torch.stack([wide[:, :, 3 * f : 3 * f + 84] for f in range(6)])
    brighter = wide[None, :, :, :84] + 0.1 * torch.arange(6.0).view(6, 1, 1, 1)
    for pixels in (pan, brighter):
        change = (pixels[1:] - pixels[:-1]).abs().mean()
        assert change > 0.09 and noise_of(pixels) < 0.02 * change
        assert plan_reuse(pixels, (6, 6), (14, 14), tau_reuse=0.06).active.all()


def test_flicker_below_the_threshold_is_no_change_and_a_fade_is_one_in_the_end():
    generator = torch.Generator().manual_seed(2)
    light = torch.tensor([0.0, 0.05, -0.05, 0.05, 0.0, -0.05]).view(6, 1, 1, 1)
    picture = textured(6, generator)
    assert plan_reuse(picture + light, (6, 6), (14, 14), tau_reuse=0.06).computed == 36
    fading = picture + 0.025 * torch.arange(6.0).view(6, 1, 1, 1)
    assert plan_reuse(fading, (6, 6), (14, 14), tau_reuse=0.06).source[:, 0].tolist() == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("patch", [(1, 4), (4, 1)])
def test_patches_of_a_row_or_a_column_have_no_noise(patch):
    """In a picture beside which it would be small."""
    pixels = torch.randn(1, 3, 8, 8) + 0.01 * torch.randn(4, 3, 8, 8)
    assert plan_reuse(pixels, (2, 2), patch, tau_reuse=0.0).noise == 0.0
    assert plan_reuse(pixels, (2, 2), (4, 4), tau_reuse=0.0).noise > 0.0


def test_an_odd_last_row_and_column_do_not_count():
    """For the noise; changes of a quarter have them in."""
    pixels = torch.randn(1, 2, 10, 10) + 0.01 * torch.randn(3, 2, 10, 10)
    other = pixels.clone()
    other[:, :, 4::5] = other[:, :, :, 4::5] = 0.0
    assert noise_of(pixels, 5) == noise_of(other, 5) > 0
