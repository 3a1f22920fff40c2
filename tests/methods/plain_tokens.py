"""What methods of other papers have in common, one number at a time: Python's integers, lists and fractions.

    fixed_point([[1.5, -0.5]])   ->   ([[402653184, -134217728]], 2**-28)

A video is a list of frames, a frame a list of tokens, a token a list of floats. Nothing here is torch's.
"""

import math
from fractions import Fraction


def bits(channels):
    """The most that an entry may have, so that no squared distance is above 2**50."""
    room = 1
    while room < channels:
        room *= 2
    return max(b for b in range(26) if room * (2 ** (b + 1)) ** 2 <= 2**50)


def fixed_point(tokens):
    """The tokens as integers, and the unit, a power of 2."""
    largest = max(abs(x) for token in tokens for x in token)
    exponent = math.frexp(largest)[1] if largest else 0
    unit = 2.0 ** (exponent - bits(len(tokens[0])))
    return [[round(x / unit) for x in token] for token in tokens], unit


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def signed_square(a, b):
    """Of two tokens, each in a unit of its own, cosine * |cosine|: in the order of the cosines, and a fraction."""
    (a,), _ = fixed_point([a])
    (b,), _ = fixed_point([b])
    lengths = dot(a, a) * dot(b, b)
    return Fraction(dot(a, b) * abs(dot(a, b)), lengths) if lengths else Fraction(0)


def cosine(a, b):
    square = signed_square(a, b)
    return math.copysign(math.sqrt(abs(square)), square)


def above(a, b, cosine):
    """Whether two tokens have a cosine above this one, a decimal above 0 like "0.8"."""
    return signed_square(a, b) > Fraction(cosine) ** 2


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def mean(tokens):
    """Of floats, rounded twice: once for the sum and once for the division."""
    return [math.fsum(entries) / len(tokens) for entries in zip(*tokens, strict=True)]


def peaks(tokens, unit, number, neighbours):
    """The indices of so many density peaks among integer tokens, in no order."""
    everyone = range(len(tokens))
    spread, score = [], []
    for i in everyone:
        others = sorted(squared_distance(tokens[i], tokens[j]) for j in everyone if j != i)[:neighbours]
        spread.append((sum(others), max(1, len(others))))
    for i in everyone:
        denser = [j for j in everyone if (spread[j][0], j) < (spread[i][0], i)]
        if denser:
            squared = min(squared_distance(tokens[i], tokens[j]) for j in denser)
        else:
            squared = max(squared_distance(tokens[i], tokens[j]) for j in everyone)
        density = -spread[i][0] / spread[i][1] * unit**2 / len(tokens[0])
        score.append(round((density + math.log(squared) / 2) * 2**20) if squared else -math.inf)
    return sorted(everyone, key=lambda i: (-score[i], i))[:number]


def clusters(floats, integers, unit, number, neighbours):
    """{center: mean of the tokens that are nearest to it}, for so many centers."""
    centers = sorted(peaks(integers, unit, number, neighbours))
    belonging = {center: [floats[center]] for center in centers}
    for i, token in enumerate(integers):
        if i not in belonging and centers:
            nearest = min(centers, key=lambda center: (squared_distance(token, integers[center]), center))
            belonging[nearest].append(floats[i])
    return {center: mean(tokens) for center, tokens in belonging.items()}


def dealt(budget, room):
    """One after another gets one, as long as there is room."""
    shares = [0] * len(room)
    while budget:
        for i, most in enumerate(room):
            if budget and shares[i] < most:
                shares[i] += 1
                budget -= 1
    return shares


def proportional(budget, sizes):
    """Largest remainder, in exact fractions."""
    wanted = [Fraction(budget * size, sum(sizes)) for size in sizes]
    shares = [math.floor(share) for share in wanted]
    while sum(shares) < budget:
        i = max(range(len(sizes)), key=lambda i: (wanted[i] - shares[i] if shares[i] <= wanted[i] else -1, -i))
        shares[i] += 1
    return shares


def highest(scores, number):
    """The indices of so many of {index: score}; of equal ones the lower index."""
    return set(sorted(scores, key=lambda i: (-scores[i], i))[:number])


def static_and_moving(video, segments, static, budget, thin_moving, neighbours):
    """{(frame, place): token}: static places merged over time, then each group thinned to its share of the budget.

    ``static(segment, place)`` says whether a place is static; ``thin_moving(places, number, tokens, integers, unit)``
    gives {(frame, place): token} of what is left of the ``places`` of a frame that are not.
    """
    places = range(len(video[0]))
    tokens = {(f, p): video[f][p] for f in range(len(video)) for p in places}
    still = {s: [p for p in places if s[1] > s[0] and static(s, p)] for s in segments}
    away = [(f, p) for s in segments for f in range(s[0] + 1, s[1] + 1) for p in still[s]]
    missing = max(0, budget - (len(tokens) - len(away)))
    away.sort(key=lambda place: (signed_square(video[place[0]][place[1]], video[place[0] - 1][place[1]]), place))
    away = set(away[missing:])
    for begin, last in segments:
        for p in still[begin, last]:
            merged = [video[f][p] for f in range(begin, last + 1) if f == begin or (f, p) in away]
            tokens[begin, p] = mean(merged)
    if missing:
        return {place: token for place, token in tokens.items() if place not in away}
    order = list(tokens)
    integers, unit = fixed_point([tokens[place] for place in order])
    integers = dict(zip(order, integers, strict=True))
    sizes = []
    for begin, last in segments:
        sizes += [len(still[begin, last])] + [len(places) - len(still[begin, last])] * (last - begin + 1)
    shares = iter(proportional(budget, sizes))
    out = {}
    for segment in segments:
        group = [(segment[0], p) for p in still[segment]]
        number = next(shares)
        if number:
            of_group = [tokens[place] for place in group], [integers[place] for place in group]
            for center, token in clusters(*of_group, unit, number, neighbours).items():
                out[group[center]] = token
        for f in range(segment[0], segment[1] + 1):
            moving = [(f, p) for p in places if p not in still[segment]]
            out |= thin_moving(moving, next(shares), tokens, integers, unit)
    return out
