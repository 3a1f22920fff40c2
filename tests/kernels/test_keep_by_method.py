"""What holds for every method that keeps tokens behind the encoder, whatever it keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, laid_out, layouts, operator_settings, ops, per_video, seeds

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import FrameTokens, Kept, Method

seen: list[FrameTokens] = []


def register(name, keep, **asks):
    """Anew for each test: nobody else knows the name then."""
    registry._registered[name] = Method(name=name, paper="none", keep=keep, **asks)
    return name


def every_third(video, budget):
    """Notes what it gets, and keeps K tokens that are spread over the video, times 2."""
    seen.append(video)
    frames, tokens = video.features.shape[:2]
    place = torch.arange(budget, device=video.features.device) * frames * tokens // budget
    places = torch.stack([place // tokens, place % tokens], dim=1)
    return Kept(2 * video.features.float().flatten(0, 1)[place], places)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    seen.clear()


@st.composite
def videos(draw):
    """features, importance, keys, counts."""
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(seeds))
    frames, tokens, channels, width = sum(counts), *(draw(st.integers(1, 7)) for _ in range(3))
    drawn = (torch.randn(*shape, generator=generator) for shape in
             ((frames, tokens, channels), (frames, tokens), (frames, tokens, width)))  # fmt: skip
    layout = draw(layouts)
    return (*(laid_out(x.to(draw(st.sampled_from([*DTYPES, torch.float64]))), layout) for x in drawn), counts)


@operator_settings
@given(video=videos(), share=st.floats(0, 1), importance=st.booleans(), keys=st.booleans())
def test_each_video_goes_through_the_method_by_itself_and_gets_what_it_asks_for(video, share, importance, keys):
    name = register("every_third", every_third, importance=importance, keys=keys)
    features, received, mean_keys, counts = video
    budget = max(1, int(share * min(counts) * features.shape[1]))
    seen.clear()
    tokens, kept = ops.keep_by_method(features, received, mean_keys, torch.tensor(counts), budget, name)
    assert tokens.dtype == features.dtype and tokens.shape == (len(counts), budget, features.shape[2])
    assert kept.dtype == torch.int64 and kept.shape == (len(counts), budget, 2) and len(seen) == len(counts)
    for index, rows in enumerate(per_video(counts)):
        assert torch.equal(seen[index].features, features[rows])
        for asked, got, whole in ((importance, seen[index].importance, received), (keys, seen[index].keys, mean_keys)):
            assert (got is None) is (not asked)
            assert got is None or (got.dtype == torch.float32 and torch.equal(got, whole[rows].float()))
        for token, (frame, place) in zip(tokens[index], kept[index].tolist(), strict=True):
            torch.testing.assert_close(token, (2 * features[rows][frame, place].float()).to(token.dtype))
        places = [frame * features.shape[1] + place for frame, place in kept[index].tolist()]
        assert places == sorted(set(places))


@operator_settings
@given(video=videos())
def test_of_a_method_without_keep_every_token_stays(video):
    name = register("inside_only", None, inside=lambda ratio, layers: ())
    features, *_, counts = video
    counts = [counts[0]] * len(counts)
    features = features[:1].expand(sum(counts), -1, -1)
    budget = counts[0] * features.shape[1]
    tokens, kept = ops.keep_by_method(features, None, None, torch.tensor(counts), budget, name)
    for index, rows in enumerate(per_video(counts)):
        assert torch.equal(tokens[index], features[rows].reshape(budget, -1))
        assert kept[index].tolist() == [[f, p] for f in range(counts[0]) for p in range(features.shape[1])]
    if budget > 1:
        with pytest.raises(ValueError, match=f"{budget - 1} of {budget} tokens, but method .inside_only. leaves none"):
            ops.keep_by_method(features, None, None, torch.tensor(counts), budget - 1, name)


def call(name="mine", frames=4, tokens=3, budget=5, **given):
    features = given.pop("features", torch.ones(frames, tokens, 2))
    counts = torch.tensor(given.pop("counts", [frames]))
    return ops.keep_by_method(features, given.get("importance"), given.get("keys"), counts, budget, name)


def first(video, budget):
    place = torch.arange(budget)
    tokens = video.features.shape[1]
    return Kept(video.features.flatten(0, 1)[:budget], torch.stack([place // tokens, place % tokens], dim=1))


def changed(**how):
    """``first``, with something wrong about what it returns."""

    def keep(video, budget):
        kept = first(video, budget)
        return Kept(*(how.get(name, lambda x: x)(x) for name, x in zip(("tokens", "places"), kept, strict=True)))

    return keep


WRONG = {
    "a tuple of three": (lambda video, budget: (*first(video, budget), 1), "a tuple; it must return a Kept"),
    "tokens alone": (lambda video, budget: first(video, budget).tokens, "a Tensor; it must return a Kept"),
    "lists": (lambda video, budget: Kept([1], [1]), "a Kept; it must return a Kept of two tensors"),
    "one too few": (lambda video, budget: first(video, budget - 1), r"tokens \[4, 2\].*float \[5, 2\], K tokens"),
    "one too many": (lambda video, budget: first(video, budget + 1), r"tokens \[6, 2\].*float \[5, 2\], K tokens"),
    "other channels": (changed(tokens=lambda x: x[:, :1]), r"tokens \[5, 1\].*float \[5, 2\]"),
    "whole tokens": (changed(tokens=lambda x: x.long()), r"tokens \[5, 2\] of torch.int64"),
    "one place": (changed(places=lambda x: x[:1]), r"places \[1, 2\].*int64 \[5, 2\], one for each token"),
    "places flat": (changed(places=lambda x: x[:, 0]), r"places \[5\] of"),
    "places int32": (changed(places=lambda x: x.int()), r"of torch.int32; .*int64 \[5, 2\]"),
    "a frame too far": (changed(places=lambda x: x + torch.tensor([3, 0])), "outside the video; .*below 4 .*below 3"),
    "a token too far": (changed(places=lambda x: x + torch.tensor([0, 1])), "outside the video"),
    "before the first": (changed(places=lambda x: x - torch.tensor([1, 0])), "outside the video"),
    "descending": (changed(places=lambda x: x.flip(0)), "out of order, or one twice; it must return ascending ones"),
    "one twice": (changed(places=lambda x: x[[0, 0, 2, 3, 4]]), "out of order, or one twice"),
    "NaN": (changed(tokens=lambda x: x / 0 * 0), "NaN or inf; it must return finite ones"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_method_that_returns_something_else_is_named_with_what_it_must_return(how):
    keep, message = WRONG[how]
    name = register("mine", keep)
    with pytest.raises(ValueError, match=f"method 'mine' returned .*{message}"):
        call(name)


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("how", ["a frame too far", "descending", "NaN"])
def test_it_is_found_in_whichever_video_it_is(wrong, how):
    numbers = iter(range(3))
    name = register("mine", lambda *video: (WRONG[how][0] if next(numbers) == wrong else first)(*video))
    with pytest.raises(ValueError, match="method 'mine' returned "):
        call(name, frames=12, counts=[4, 4, 4])


def test_places_are_those_of_their_own_video():
    """What is inside the longest of them may be outside of another."""
    last = register("mine", lambda video, budget: Kept(video.features[-1, -1:], torch.tensor([[5, 2]])))
    assert call(last, frames=6, budget=1)[1].tolist() == [[[5, 2]]]
    with pytest.raises(ValueError, match="outside the video; it must return frames below 4, 6 and tokens below 3"):
        call(last, frames=10, counts=[6, 4], budget=1)


def test_too_large_for_the_dtype_of_the_features_is_not_handed_on():
    name = register("mine", changed(tokens=lambda x: x.float() * 1e5))
    with pytest.raises(ValueError, match="'mine' returned tokens with NaN or inf"):
        call(name, features=torch.ones(4, 3, 2, dtype=torch.float16))


def test_an_error_in_a_method_says_whose_it_is():
    def broken(video, budget):
        raise ZeroDivisionError("no tokens like this")

    name = register("mine", broken)
    with pytest.raises(ZeroDivisionError, match="no tokens like this") as caught:
        call(name)
    assert caught.value.__notes__ == ["in keep() of method 'mine', for [4, 3, 2] and K = 5"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, r"budget=0, .*4 frames of 3 tokens; .*\[1, 12\]"),
        ({"budget": 13}, r"budget=13, .*\[1, 12\]"),
        ({"counts": [3]}, r"counts=\[3\] over 4 frames"),
        ({"counts": [4, 0]}, r"counts=\[4, 0\] over 4 frames"),
        ({"counts": [[4]]}, r"counts must be int64 \[videos\]"),
        ({"counts": [4.0]}, r"counts must be int64 \[videos\], got torch.float32"),
        ({"features": torch.ones(4, 3)}, r"features must be a float tensor \[frames, tokens, channels\], got 2 axes"),
        ({"features": torch.ones(4, 3, 2, dtype=int)}, "features must be .* got 3 axes of torch.int64"),
        ({"features": torch.full((4, 3, 2), torch.inf)}, "features hold NaN or inf; check the vision encoder"),
        ({"importance": torch.ones(4, 3, 1)}, r"importance must be a float tensor \[frames, tokens\], got 3 axes"),
        ({"importance": torch.ones(4, 2)}, r"importance \[4, 2\] beside features \[4, 3, 2\]"),
        ({"importance": torch.full((4, 3), torch.nan)}, "importance holds NaN or inf"),
        ({"keys": torch.ones(4, 3)}, r"keys must be a float tensor \[frames, tokens, channels\], got 2 axes"),
        ({"keys": torch.ones(3, 3, 2)}, r"keys \[3, 3, 2\] beside features \[4, 3, 2\]"),
        ({"keys": torch.full((4, 3, 1), torch.nan)}, "keys hold NaN or inf"),
        ({"name": "earlytom"}, "'earlytom' has operators of its own"),
    ],
)
def test_what_is_wrong_with_what_is_given(given, message):
    given = {"name": register("mine", first), **given}
    with pytest.raises(ValueError, match=f"earlytom::keep_by_method: {message}"):
        call(**given)


@pytest.mark.parametrize("asks", ["importance", "keys"])
def test_what_a_method_asks_for_and_nobody_gives(asks):
    name = register("mine", first, **{asks: True})
    with pytest.raises(ValueError, match=f"method 'mine' asks for {asks}, and none is given"):
        call(name)


def test_a_name_that_nobody_has():
    with pytest.raises(EarlyTomConfigError, match="method='hers': must be one of 'earlytom', "):
        call("hers")


def test_autocast_does_not_reach_into_a_method():
    def product(video, budget):
        assert (video.features[0] @ video.features[0].mT).dtype == torch.float32
        return first(video, budget)

    name = register("mine", product)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        call(name)
