"""Reuse of unchanged patches a second time, another way about: place after place, heaps, packed rows.

``reference.plan_reuse`` and ``reference.encode_with_reuse`` must equal it. Nothing is shared with the package.
"""

import heapq
import math
from fractions import Fraction

import numpy as np
import torch


def cut(pixels, grid, patch):
    """float32 [F, P, C, height, width]: the pixels of every patch."""
    pixels = pixels.float().numpy()
    frames, channels = pixels.shape[:2]
    (rows, columns), (height, width) = grid, patch
    inside = pixels[:, :, : rows * height, : columns * width]
    tiles = inside.reshape(frames, channels, rows, height, columns, width).transpose(0, 2, 4, 1, 3, 5)
    return tiles.reshape(frames, rows * columns, channels, height, width)


def mean(numbers):
    numbers = [float(number) for number in np.ravel(numbers)]
    return math.fsum(numbers) / len(numbers)


def apart(a, b):
    """Of two [C, height, width], pixel by pixel sorted into quarters."""
    channels, height, width = a.shape
    quarters = {}
    for c, y, x in np.ndindex(channels, height, width):
        quarters.setdefault((c, y < height // 2, x < width // 2), []).append((a[c, y, x], b[c, y, x]))
    moved = [abs(mean(old) - mean(new)) for old, new in (zip(*pairs, strict=True) for pairs in quarters.values())]
    return np.float32(max(*moved, mean(np.abs(a - b)) / 3))


def runs(of_patch, threshold):
    """``[[(frame, change), ...], ...]`` of one patch [F, C, height, width]: a new run where it differs from the first
    of the last."""
    found = [[(0, math.inf)]]
    for f in range(1, len(of_patch)):
        change = apart(of_patch[f], of_patch[found[-1][0][0]])
        if change <= np.float32(threshold):
            found[-1].append((f, float(change)))
        else:
            found.append([(f, float(change))])
    return found


def noise(pixels, grid, patch):
    pixels = pixels.float().numpy()
    (rows, columns), (height, width) = grid, patch
    found = []
    for before, after in zip(pixels, pixels[1:], strict=False):
        moved = after - before
        for top in range(0, rows * height, height):
            for left in range(0, columns * width, width):
                seen = [
                    abs((m[y, x] - m[y, x + 1] - m[y + 1, x] + m[y + 1, x + 1]) / np.float32(2))
                    for m in moved
                    for y in range(top, top + height - 1, 2)
                    for x in range(left, left + width - 1, 2)
                ]
                if seen:
                    found.append(np.float32(math.fsum(map(float, seen)) / len(seen)))
    if not found:
        return np.float32(0)
    quiet = np.sort(found)[math.floor(0.5 * (len(found) - 1))]
    inside = [Fraction(float(value)) for value in np.ravel(pixels[:, :, : rows * height, : columns * width])]
    variance = sum(value**2 for value in inside) / len(inside) - (sum(inside) / len(inside)) ** 2
    return np.float32(0) if (2 * Fraction(float(quiet))) ** 2 > variance else quiet


def shaken(quiet, patch):
    """Four standard deviations of what white noise with a mean absolute difference of ``quiet`` does to the difference
    of two means over the smallest quarter of a patch; but not less than two fifths of ``quiet``."""
    smallest = math.prod(side // 2 if side > 1 else 1 for side in patch)
    sigma = float(quiet) * math.sqrt(math.pi) / 2
    return max(4 * sigma * math.sqrt(2 / smallest), 2 * float(quiet) / 5)


def fill(of_places, missing):
    """Cut the last frame off a run and give it one of its own, ``missing`` times; a heap has the last of each run."""
    ends = []

    def offer(s, run):
        if len(run) > 1:
            f, change = run[-1]
            heapq.heappush(ends, (-change, s, -f, run))

    for s, found in enumerate(of_places):
        for run in found:
            offer(s, run)
    for _ in range(missing):
        _, s, _, run = heapq.heappop(ends)
        of_places[s].append([run.pop()])
        offer(s, run)


def plan(pixels, grid, patch, *, prefix=0, tau_reuse=0.0, budget=None):
    """(source [F, S] as lists, change [F, S] as lists, noise, threshold)."""
    patches = cut(pixels, grid, patch)
    frames, count = len(patches), prefix + patches.shape[1]
    quiet = noise(pixels, grid, patch)

    def scanned(threshold):
        leading = [[[(f, math.inf)] for f in range(frames)] for _ in range(prefix)]
        return leading + [runs(patches[:, p], threshold) for p in range(count - prefix)]

    def active(found):
        return sum(map(len, found))

    if budget is None:
        threshold = np.float32(math.sqrt(tau_reuse**2 + shaken(quiet, patch) ** 2))
        found = scanned(threshold)
        total = size_of(active(found), frames, count, prefix)
        if active(found) <= frames * count * 4 / 5:
            total = min(total, active(found) + sum(worth_while(run) for of_place in found for run in of_place))
    else:
        low, threshold = np.float32(0), pixels.float().numpy().max() - pixels.float().numpy().min()
        if active(scanned(low)) <= budget:
            threshold = low
        else:
            for _ in range(12):
                middle = (low + threshold) / np.float32(2)
                low, threshold = (low, middle) if active(scanned(middle)) <= budget else (middle, threshold)
        found, total = scanned(threshold), budget
    change = [[0.0] * count for _ in range(frames)]
    for s, of_place in enumerate(found):
        for f, value in (pair for run in of_place for pair in run):
            change[f][s] = value
    fill(found, total - active(found))
    source = [[0] * count for _ in range(frames)]
    for s, of_place in enumerate(found):
        for run in of_place:
            for f, _ in run:
                source[f][s] = run[0][0]
    return source, change, float(quiet), float(threshold)


def worth_while(run):
    """How many frames of a run lie behind the last that has not changed at all; never the first, which is computed."""
    return next((n for n, (_, change) in enumerate(reversed(run)) if change == 0), len(run) - 1)


def size_of(active, frames, places, prefix):
    """The smallest allowed number of computed places that holds ``active``."""
    return min(size for size in sizes(frames, places, prefix, active) if size >= active)


def sizes(frames, places, prefix, active=0):
    """At most 17; beyond four fifths only all of them."""
    everything = frames * places
    if active > everything * 4 / 5:
        return {everything}
    changing = (frames - 1) * (places - prefix)
    return {min(everything - changing + k * -(-changing // 16), everything) for k in range(17)}


def packed_encoder(hidden, layers, source, full_layers=()):
    """[F, S, D] behind the last layer, computed for active rows only, which are packed; what happened to the others
    is made up for before each full layer and at the end.

    A layer has ``project(x [n, D], places [n])`` -> query, key, value ``[n, H, d]``, and ``finish(x, attended [n, H,
    d]) -> [n, D]``; attention is softmax(q k / sqrt(d)) v within a frame.
    """
    frames, places, _ = hidden.shape
    rows = [(f, s) for f in range(frames) for s in range(places) if source[f][s] == f]
    everything = [(f, s) for f in range(frames) for s in range(places)]
    row_of = {place: row for row, place in enumerate(rows)}
    reads = [[row_of[int(source[f][s]), s] for s in range(places)] for f in range(frames)]
    entered = packed = None
    for index, layer in enumerate(layers):
        if index in full_layers:
            if packed is not None:
                hidden, packed = unpacked(hidden, entered, packed, rows, reads), None
            flat = hidden.flatten(0, 1)
            asked = [list(range(f * places, (f + 1) * places)) for f in range(frames)]
            hidden = through(layer, flat, everything, asked).view_as(hidden)
        else:
            if packed is None:
                entered = packed = torch.stack([hidden[f, s] for f, s in rows])
            packed = through(layer, packed, rows, reads)
    return hidden if packed is None else unpacked(hidden, entered, packed, rows, reads)


def through(layer, x, rows, reads):
    """One layer over packed rows ``x [n, D]``; the row of (f, s) attends to the rows ``reads[f]``."""
    query, key, value = layer.project(x, torch.tensor([s for _, s in rows]))
    attended = torch.empty_like(query)
    for row, (f, _) in enumerate(rows):
        scores = (key[reads[f]] * query[row]).sum(-1) / query.shape[-1] ** 0.5  # [S, H]
        attended[row] = (scores.softmax(0)[..., None] * value[reads[f]]).sum(0)
    return layer.finish(x, attended)


def unpacked(hidden, entered, packed, rows, reads):
    left = torch.stack([h + (packed - entered)[read] for h, read in zip(hidden, reads, strict=True)])
    for row, (f, s) in enumerate(rows):
        left[f, s] = packed[row]
    return left
