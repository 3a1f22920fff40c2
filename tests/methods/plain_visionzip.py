"""The rules of VisionZip (methods/visionzip.py), in loops over Python's numbers.

keep_in_python([[[1.0, 2.0]]], [[1.0]], [[[0.5]]], 1)   ->   [[1.0, 2.0]], [[0, 0]]
"""

import math

_SLACK = 1e-5
"""Of cosines: far above the rounding of float32, and below the difference of any two of the vectors that are drawn."""


def _shares(frames, budget):
    """Tokens of each frame: K (f + 1) / F, rounded down, are those of the first f + 1 frames."""
    upto = [math.floor(budget * frame / frames) for frame in range(frames + 1)]
    return [after - before for before, after in zip(upto, upto[1:], strict=False)]


def _cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def _dominant(importance, count):
    return sorted(sorted(range(len(importance)), key=lambda place: (-importance[place], place))[:count])


def _frame(importance, keys, share):
    """{place of each token that stays: the places of those that it is made of}."""
    dominant = _dominant(importance, math.floor(54 * share / 64 + 0.5))
    others = [place for place in range(len(importance)) if place not in dominant]
    contextual = share - len(dominant)
    targets = [others[math.floor(number * len(others) / contextual)] for number in range(contextual)]
    joined = {target: [target] for target in targets}
    for place in others if targets else ():
        if place not in targets:
            alike = {target: _cosine(keys[place], keys[target]) for target in targets}
            best = max(alike.values())
            assert all(best - a < 1e-9 or best - a > _SLACK for a in alike.values()), "too close to tell in float32"
            joined[next(target for target in targets if alike[target] > best - _SLACK)].append(place)
    return {**{place: [place] for place in dominant}, **joined}


def keep_in_python(features, importance, keys, budget):
    """(tokens, places) as lists."""
    tokens, places = [], []
    for frame, share in enumerate(_shares(len(features), budget)):
        for place, parts in sorted(_frame(importance[frame], keys[frame], share).items()):
            columns = zip(*(features[frame][part] for part in parts), strict=True)
            tokens.append([sum(column) / len(parts) for column in columns])
            places.append([frame, place])
    return tokens, places
