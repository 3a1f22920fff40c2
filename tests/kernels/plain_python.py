"""What the operators must compute, one number at a time in Python and numpy: slow, short, and nothing shared.

    plan_merge(...)   ->   [{frame: weight}, ...] of one video, by the rules of the algorithm read literally

Each function sees one video, one frame or one row. Thresholds and the moving average are float32.
"""

import math
import statistics

import numpy as np

Segments = list[tuple[int, int]]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else 0.0


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return sum(cosine(x, y) for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)) / len(a)


def banded(hidden: np.ndarray, band: int) -> np.ndarray:
    out = np.zeros((len(hidden), band))
    for t in range(len(hidden)):
        for j in range(min(band, t)):
            out[t, j] = similarity(hidden[t], hidden[t - 1 - j])
    return out


def segments(s: np.ndarray, variant: str, tau_seg: float, alpha: float, max_window: int) -> Segments:
    """``s[a, b]`` is the similarity of frames a and b."""
    found: list[list[int]] = [[0]]
    average = np.float32(1)
    for t in range(1, len(s)):
        head = found[-1][0]
        other = t - 1 if variant == "paper" else head
        average = np.float32(alpha) * np.float32(s[t, other]) + np.float32(1 - alpha) * average
        size = len(found[-1])
        if variant == "paper":
            full = max_window > 0 and size == max_window
        else:
            full = max_window > 0 and t - head + 1 >= max_window
        if average < np.float32(tau_seg) or full:
            found.append([t])
            average = np.float32(1)
        else:
            found[-1].append(t)
    return [(frames[0], frames[-1]) for frames in found]


def plan_merge(
    s: np.ndarray,
    variant: str,
    tau_seg: float,
    alpha: float,
    max_window: int,
    tau_merge: float,
    min_frames: int,
) -> list[dict[int, float]]:
    """One {frame: weight} for each frame that is left."""
    cut = segments(s, variant, tau_seg, alpha, max_window)
    merges: list[tuple[int, float, float]] = []
    dropped: set[int] = set()
    for head, tail in cut:
        threshold = s[head, tail] if math.isnan(tau_merge) else np.float32(tau_merge)
        middle = list(range(head + 1, tail))
        while len(middle) >= 2:
            i = middle[0]
            alike, following = s[i, i + 1], s[i + 1, i + 2]
            if variant == "released":
                following = following if len(middle) > 2 else 0.0
                good = alike > threshold and alike > following
            else:
                good = alike >= threshold and alike >= following
            if good:
                merges.append((i, float(alike), float(following)))
            middle = middle[2 if good else 1 :]
        if variant == "released" and tail - head > 2 and middle:
            dropped.add(middle[0])
    if variant == "paper":
        while merges and len(s) - len(merges) < min_frames:
            lowest = min(alike for _, alike, _ in merges)
            merges.remove([merge for merge in merges if merge[1] == lowest][-1])
    merged = {i: weights(alike, following, variant) for i, alike, following in merges}
    rows: list[dict[int, float]] = []
    for t in range(len(s)):
        if t in merged:
            rows.append({t: merged[t][0], t + 1: merged[t][1]})
        elif t - 1 not in merged and t not in dropped:
            rows.append({t: 1.0})
    return rows


def weights(alike: float, following: float, variant: str) -> tuple[float, float]:
    if variant == "paper":
        if alike <= 0 and following <= 0:
            return 0.5, 0.5
        alike, following = max(alike, 0.0), max(following, 0.0)
    elif alike + following == 0:
        return 0.5, 0.5
    return alike / (alike + following), following / (alike + following)


def merge(x: np.ndarray, plan: list[dict[int, float]]) -> np.ndarray:
    return np.stack([sum(weight * x[t] for t, weight in row.items()) for row in plan])


def attention_received(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """One frame: [H, S, d] twice -> [S]."""
    heads, tokens, _ = query.shape
    received = np.zeros(tokens)
    for head in range(heads):
        for i in range(tokens):
            scores = np.array([scale * float(query[head, i] @ key[head, j]) for j in range(tokens)])
            exponentials = np.exp(scores - scores.max())
            received += exponentials / exponentials.sum()
    return received / (heads * tokens)


def paper_quotas(dynamic: list[bool], budget: int) -> list[int]:
    quotas = [budget // len(dynamic)] * len(dynamic)
    favoured = [t for t, flag in enumerate(dynamic) if flag] + [t for t, flag in enumerate(dynamic) if not flag]
    for t in favoured[: budget - sum(quotas)]:
        quotas[t] += 1
    return quotas


def released_quotas(dynamic: list[bool], tokens: int, frames: int, retain_ratio: float) -> list[int]:
    ratio = min(retain_ratio / (len(dynamic) / frames), 1.0)
    return [math.ceil(tokens * ratio) if flag else max(1, round(tokens * ratio)) for flag in dynamic]


def select(importance: np.ndarray, dynamic: list[bool], quotas: list[int]) -> list[list[int]]:
    """[frame, token] of every kept token of one video."""
    kept = []
    for frame, (scores, flag, quota) in enumerate(zip(importance.tolist(), dynamic, quotas, strict=True)):
        if flag:
            tokens = sorted(range(len(scores)), key=lambda p: (-scores[p], p))[:quota]
        else:
            runs = np.array_split(np.arange(len(scores)), quota) if quota else []
            tokens = [min(run.tolist(), key=lambda p: (-scores[p], p)) for run in runs]
        kept += [[frame, token] for token in sorted(tokens)]
    return kept


def keep_row(row: list[int], video_token: int, before: int, quotas: list[int]) -> list[int]:
    """Positions of one row that stay; its videos keep ``quotas``."""
    positions, seen = [], 0
    for position, token in enumerate(row):
        if token != video_token:
            positions.append(position)
            continue
        if seen % before < quotas[seen // before]:
            positions.append(position)
        seen += 1
    return positions


def blocks(frames: int, tokens: int) -> list[tuple[range, list[int]]]:
    """(frames, places) of each block of one video in which representatives are looked for together."""
    windows = np.array_split(np.arange(frames), math.ceil(frames / 8))
    strips = np.array_split(np.arange(tokens), math.ceil(tokens / 16))
    return [
        (range(int(window[0]), int(window[-1]) + 1), (window[:, None] * tokens + strip).ravel().tolist())
        for window in windows
        for strip in strips
    ]


def likeness(window: np.ndarray) -> np.ndarray:
    """[m, P, D] -> [m P, m P]: how well the token of the column stands for that of the row."""
    tokens = window.reshape(-1, window.shape[2]).astype(np.float64)
    apart = tokens - tokens.mean(0)
    lengths = np.linalg.norm(apart, axis=1)
    lengths[lengths <= 1e-5 * np.linalg.norm(tokens, axis=1)] = 0
    alike = np.zeros((len(apart), len(apart)))
    for i, j in np.ndindex(alike.shape):
        if lengths[i] > 0 and lengths[j] > 0:
            between = abs(i // window.shape[1] - j // window.shape[1])
            alike[i, j] = max(0.0, cosine(apart[i], apart[j])) * 0.75**between * (lengths[i] / lengths.mean()) ** 0.75
    return alike


def last_gain(alike: np.ndarray, kept: set[int], tie: float, rounding: float) -> float:
    """Of taking the token of largest gain again and again: the largest gain before the last turn, if that can end with
    ``kept`` (infinite if nothing is kept); NaN if it cannot.

    Gains within ``tie`` of the largest are equal and the lowest index of them wins. A gain that is nearer to that
    border than ``rounding`` may lie on either side, so all that such gains allow is tried.
    """

    def go_on(taken: list[int], covered: np.ndarray, last: float) -> float:
        if len(taken) == len(kept):
            return last
        gains = gains_of(alike, taken, covered)
        most = max(gains.values())
        surely = next(j for j, gain in gains.items() if gain >= most - tie + rounding)
        for j, gain in gains.items():
            if j in kept and j <= surely and gain >= most - tie - rounding:
                found = go_on([*taken, j], np.maximum(covered, alike[:, j]), most)
                if not math.isnan(found):
                    return found
        return math.nan

    return go_on([], np.zeros(len(alike)), math.inf)


def next_gain(alike: np.ndarray, kept: set[int]) -> float:
    """The largest gain of one more token."""
    covered = alike[:, sorted(kept)].max(1, initial=0.0)
    return max(gains_of(alike, sorted(kept), covered).values(), default=-math.inf)


def gains_of(alike: np.ndarray, taken: list[int], covered: np.ndarray) -> dict[int, float]:
    """What each of the other tokens would add."""
    return {j: float(np.maximum(0, alike[:, j] - covered).sum()) for j in range(len(alike)) if j not in taken}


Table = list[list[int]]
Changes = list[list[float]]


def pixels_of(frame: np.ndarray, grid: list[int], patch: list[int], number: int) -> np.ndarray:
    """[C, height, width] of one patch of a frame [C, H, W]."""
    top, left = number // grid[1] * patch[0], number % grid[1] * patch[1]
    return frame[:, top : top + patch[0], left : left + patch[1]]


def mean_of_sizes(x: np.ndarray) -> float:
    values = [abs(float(value)) for value in x.ravel()]
    return math.fsum(values) / len(values)


def quarters_of(patch: np.ndarray) -> list[np.ndarray]:
    """Of every channel; fewer where a side cannot be cut."""
    _, height, width = patch.shape
    cuts = [
        (i, j)
        for i in (slice(height // 2), slice(height // 2, height))
        for j in (slice(width // 2), slice(width // 2, width))
    ]
    return [channel[cut] for channel in patch for cut in cuts if channel[cut].size]


def change_of_patch(one: np.ndarray, other: np.ndarray) -> np.float32:
    of_means = [
        abs(math.fsum([*map(float, a.ravel()), *map(float, -b.ravel())])) / a.size
        for a, b in zip(quarters_of(one), quarters_of(other), strict=True)
    ]
    return np.float32(max(*of_means, mean_of_sizes(one - other) / 3))


def scan_places(views: list[list[np.ndarray]], prefix: int, threshold: np.float32) -> tuple[Table, Changes]:
    """``views[f][p]`` float32 are the pixels of patch p in frame f."""
    source = [[f] * prefix + [0] * len(views[0]) for f in range(len(views))]
    change = [[math.inf] * (prefix + len(views[0])) for _ in views]
    for f in range(1, len(views)):
        for p, now in enumerate(views[f]):
            computed = source[f - 1][prefix + p]
            apart = change_of_patch(now, views[computed][p])
            source[f][prefix + p] = computed if apart <= threshold else f
            change[f][prefix + p] = float(apart)
    return source, change


def active_places(source: Table) -> list[tuple[int, int]]:
    return [(f, s) for f, row in enumerate(source) for s, g in enumerate(row) if g == f]


def noise_of_pixels(views: list[list[np.ndarray]]) -> np.float32:
    found = []
    for before, now in zip(views, views[1:], strict=False):
        for one, other in zip(before, now, strict=True):
            apart = other - one
            blocks = [
                (apart[c, i, j] - apart[c, i, j + 1] - apart[c, i + 1, j] + apart[c, i + 1, j + 1]) / np.float32(2)
                for c in range(apart.shape[0])
                for i in range(0, apart.shape[1] - 1, 2)
                for j in range(0, apart.shape[2] - 1, 2)
            ]
            if blocks:
                found.append(np.float32(mean_of_sizes(np.array(blocks))))
    noise = statistics.median_low(found) if found else np.float32(0)
    loudness = statistics.pstdev(float(value) for frame in views for patch in frame for value in patch.ravel())
    return noise if noise <= loudness / 2 else np.float32(0)


def fill_places(source: Table, change: Changes, total: int, least: float = 0) -> None:
    """More active places, one by one: always the last of a run, and of a change of at least ``least``."""
    frames = len(source)
    while len(active_places(source)) < total:
        ends = [
            (-change[f][s], s, -f)
            for f, row in enumerate(source)
            for s, g in enumerate(row)
            if g != f and (f + 1 == frames or source[f + 1][s] == f + 1)
        ]
        minus_change, s, minus_f = min(ends)
        if -minus_change < least:
            break
        source[-minus_f][s] = -minus_f


def rounded_up(active: int, frames: int, places: int, prefix: int) -> int:
    every, fewest = frames * places, places + (frames - 1) * prefix
    sizes = [fewest + i * math.ceil((every - fewest) / 16) for i in range(17)]
    return min(min(size for size in sizes if size >= active), every)


def plan_reuse(
    pixels: np.ndarray, grid: list[int], patch: list[int], prefix: int, tau: float, budget: int
) -> tuple[Table, Changes, np.float32, np.float32]:
    """(source, change, noise, threshold) of one video, float32 [F, C, H, W]."""
    views = [[pixels_of(frame, grid, patch, p) for p in range(grid[0] * grid[1])] for frame in pixels]
    noise = noise_of_pixels(views)
    if budget:
        threshold = threshold_of_budget(views, prefix, budget, pixels.max() - pixels.min())
    else:
        smallest = min(quarter.size for quarter in quarters_of(views[0][0]))
        of_means, of_pixels = 4 * math.sqrt(math.pi / (2 * smallest)), 0.4
        threshold = np.float32(math.hypot(tau, float(noise) * max(of_means, of_pixels)))
    source, change = scan_places(views, prefix, threshold)
    active, places = len(active_places(source)), prefix + len(views[0])
    if budget:
        fill_places(source, change, budget)
    elif active > 0.8 * len(pixels) * places:
        fill_places(source, change, len(pixels) * places)
    else:
        smallest_change = min((c for row in change for c in row if c > 0), default=math.inf)
        fill_places(source, change, rounded_up(active, len(pixels), places, prefix), smallest_change)
    return source, change, noise, threshold


def threshold_of_budget(views: list[list[np.ndarray]], prefix: int, budget: int, high: np.float32) -> np.float32:
    def fits(threshold: np.float32) -> bool:
        return len(active_places(scan_places(views, prefix, threshold)[0])) <= budget

    low = np.float32(0)
    if fits(low):
        return low
    for _ in range(12):
        middle = (low + high) / np.float32(2)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def packed_places(videos: list[Table]) -> tuple[list[int], Table, list[int]]:
    """index, rows and offsets of all videos' sources."""
    row_of, index, offsets = {}, [], [0]
    for v, source in enumerate(videos):
        for f, frame in enumerate(source):
            for s, g in enumerate(frame):
                if g == f:
                    row_of[v, f, s] = len(index)
                    index.append((v * len(source) + f) * len(frame) + s)
            offsets.append(len(index))
    rows = [[row_of[v, g, s] for s, g in enumerate(frame)] for v, source in enumerate(videos) for frame in source]
    return index, rows, offsets


def reuse_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, rows: Table, offsets: list[int], scale: float
) -> np.ndarray:
    """[H, T, d] three times -> [H, T, d]."""
    out = np.zeros_like(query)
    for head in range(len(query)):
        for frame, answering in enumerate(rows):
            for asking in range(offsets[frame], offsets[frame + 1]):
                scores = np.array([scale * float(query[head, asking] @ key[head, row]) for row in answering])
                shares = np.exp(scores - scores.max())
                for share, row in zip(shares / shares.sum(), answering, strict=True):
                    out[head, asking] += share * value[head, row]
    return out
