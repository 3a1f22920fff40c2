"""The paper variant a second time, over Python lists, one obvious step after another.

``reference.py`` must equal it. A video is ``frames[t][token][channel]``. Nothing is shared with the package.
"""

import math
import struct


def f32(x):
    """Round to float32, after every step that the algorithm does in float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    squares = math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    return dot / math.sqrt(squares) if squares > 0 else 0.0


def similarity(a, b):
    return f32(math.fsum(cosine(x, y) for x, y in zip(a, b, strict=True)) / len(a))


def segments(frames, tau_seg, alpha, max_window):
    """Grow segments frame by frame; a frame joins the open one or opens the next."""
    open_segment, average, closed = [0], 1.0, []
    for t in range(1, len(frames)):
        s_t = similarity(frames[t], frames[t - 1])
        average = f32(f32(f32(alpha) * s_t) + f32(f32(1 - alpha) * average))
        full = max_window is not None and len(open_segment) == max_window
        if average < f32(tau_seg) or full:
            closed.append(open_segment)
            open_segment, average = [], 1.0
        open_segment.append(t)
    return [*closed, open_segment]


def pairs(frames, segment, tau_merge):
    """First frames of the pairs that merge, by recursion on what is left of the segment."""
    threshold = similarity(frames[segment[0]], frames[segment[-1]]) if tau_merge == "segment" else f32(tau_merge)

    def left(rest):
        """``rest``: middle frames not looked at yet, then the tail."""
        if len(rest) < 3:
            return []
        first, second, third = rest[:3]
        s_i, s_next = similarity(frames[first], frames[second]), similarity(frames[second], frames[third])
        if s_i < threshold or s_i < s_next:
            return left(rest[1:])
        return [(first, s_i, s_next), *left(rest[2:])]

    return left(segment[1:])


def merge_groups(frames, tau_seg, alpha, max_window, tau_merge, min_frames):
    """``[{frame: weight}]`` for every frame that remains, in time order."""
    merging = []
    for segment in segments(frames, tau_seg, alpha, max_window):
        merging += pairs(frames, segment, tau_merge)
    while merging and len(frames) - len(merging) < min_frames:
        least = min(s_i for _, s_i, _ in merging)
        merging.remove([m for m in merging if m[1] == least][-1])
    groups = [{t: 1.0} for t in range(len(frames))]
    for first, s_i, s_next in merging:
        a, b = min(max(s_i, 0.0), 1.0), min(max(s_next, 0.0), 1.0)
        share = a / (a + b) if a + b else 0.5
        groups[first], groups[first + 1] = {first: share, first + 1: 1 - share}, None
    return [group for group in groups if group is not None]


def select(importance, segments, frames_in, retain_ratio):
    """Deal K tokens one by one, dynamic frames before static ones, round after round; then each chooses."""
    tokens = len(importance[0])
    ends = {t for segment in segments for t in (segment[0], segment[-1])}
    order = sorted(ends) + [t for t in range(len(importance)) if t not in ends]
    hands = dict.fromkeys(order, 0)
    for dealt in range(max(1, round(retain_ratio * frames_in * tokens))):
        hands[order[dealt % len(order)]] += 1
    kept = []
    for t, scores in enumerate(importance):
        windows = [list(range(tokens))] * hands[t] if t in ends else runs(tokens, hands[t])
        chosen = set()
        for window in windows:
            free = [j for j in window if j not in chosen]
            chosen.add(next(j for j in free if scores[j] == max(scores[i] for i in free)))
        kept += [[t, j] for j in sorted(chosen)]
    return kept


def runs(tokens, count):
    """Deal sizes one by one, so that they differ by at most 1 and the first ones are the longer."""
    sizes = [0] * count
    for j in range(tokens if count else 0):
        sizes[j % count] += 1
    order, cut = list(range(tokens)), []
    for size in sizes:
        cut.append(order[:size])
        order = order[size:]
    return cut


def represent(features, frames_in, retain_ratio):
    """Frames into runs of at most 8, places into runs of at most 16; in each block of these, again and again the token
    that adds most; of all, those that added most."""
    tokens = len(features[0])
    total = max(1, round(retain_ratio * frames_in * tokens))
    turns = []
    for window in runs(len(features), -(-len(features) // 8)):
        alike = likeness_in(features, window)
        for strip in runs(tokens, -(-tokens // 16)):
            block = [(t, j) for t in window for j in strip]
            covered, chosen = dict.fromkeys(block, 0.0), []
            while len(chosen) < len(block) and len(chosen) * len(features) * tokens < 2 * total * len(block):
                gains = {b: math.fsum(max(0.0, alike[a, b] - covered[a]) for a in block) for b in block}
                most = max(gains[b] for b in block if b not in chosen)
                turns.append((-math.floor(most / 1e-3 + 0.5), len(chosen), window[0], strip[0]))
                chosen.append(next(b for b in block if b not in chosen and gains[b] >= most - 1e-3))
                turns[-1] += chosen[-1]
                covered = {a: max(covered[a], alike[a, chosen[-1]]) for a in block}
    return sorted([t, j] for *_, t, j in sorted(turns)[:total])


def likeness_in(features, window):
    """``{(a, b): how well token b stands for token a}`` of the frames in ``window``, which have one mean."""
    places = [(t, j) for t in window for j in range(len(features[0]))]
    mean = [math.fsum(c) / len(places) for c in zip(*(features[t][j] for t, j in places), strict=True)]
    apart = {(t, j): [x - m for x, m in zip(features[t][j], mean, strict=True)] for t, j in places}
    length = {(t, j): math.hypot(*apart[t, j]) for t, j in places}
    length = {(t, j): x if x > 1e-5 * math.hypot(*features[t][j]) else 0.0 for (t, j), x in length.items()}
    average = math.fsum(length.values()) / len(places)
    return {
        (a, b): max(0.0, cosine(apart[a], apart[b])) * 0.75 ** abs(a[0] - b[0]) * (length[a] / average) ** 0.75
        if length[a] > 0 and length[b] > 0
        else 0.0
        for a in places
        for b in places
    }


def merge_inner(hidden, scores, image_start, image_length, drop_ratio):
    """``({position: merged token}, in order)`` with the true mean of everything that joins a kept token."""
    image = range(image_start, image_start + image_length)
    kept = set()
    while len(kept) < min(image_length, max(1, round(image_length * (1 - drop_ratio)))):
        free = [p for p in image if p not in kept]
        kept.add(next(p for p in free if scores[p] == max(scores[q] for q in free)))
    groups = {p: [token] for p, token in enumerate(hidden) if p not in image or p in kept}
    for p in image:
        if p not in kept:
            likeness = {q: f32(cosine(hidden[p], hidden[q])) for q in sorted(kept)}
            groups[max(likeness, key=likeness.get)].append(hidden[p])
    return {p: [math.fsum(c) / len(group) for c in zip(*group, strict=True)] for p, group in groups.items()}
