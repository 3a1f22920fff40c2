"""How long a benchmark takes is said beforehand: every call is counted, and as many as there are."""

from types import SimpleNamespace

import pytest
import torch

from earlytom_compile.benchmarks import forecast
from earlytom_compile.benchmarks.arms import arm_names, make_arms
from earlytom_compile.benchmarks.forecast import (
    Forecast,
    Piece,
    compilation,
    forecast_of,
    forecast_of_load,
    in_words,
    told,
)
from earlytom_compile.benchmarks.load import make_servers, server_names
from earlytom_compile.benchmarks.measure import measure
from earlytom_compile.benchmarks.workload import make_inputs, random_model
from earlytom_compile.shapes import config_of

PIECE = Piece(2.0, 0.1)


@pytest.fixture(scope="module")
def model():
    return random_model(config_of("cpu-tiny"), device="cpu", dtype=torch.float32)


def arm(name, frames=8, compresses=False):
    return SimpleNamespace(name=name, frames=frames, compresses=compresses)


def test_calls_that_are_not_compiled_are_counted_exactly():
    found = forecast_of([arm("transformers")], PIECE, frames=8, repeats=5, decode_tokens=3, layers=10, lowering="eager")
    assert found.calls == found.seconds == pytest.approx(2.0 * (2 + 5 + 1.5) + 5 * 3 * 0.1)


def test_every_arm_and_round_counts_and_compilation_only_once_an_arm():
    arms = [arm("transformers"), arm("earlytom 0.1", compresses=True), arm("inductor")]
    few, many = (
        forecast_of(arms, PIECE, frames=8, repeats=repeats, decode_tokens=0, layers=10, lowering="staged")
        for repeats in (0, 400)
    )
    assert many.compilation == few.compilation == sum(compilation(each.name, 10, "staged") for each in arms)
    assert many.calls - few.calls == pytest.approx(400 * 2.0 * (1 + forecast.COMPRESSED + 1))


def test_compilation_is_told_apart_since_it_is_guessed():
    said = told(Forecast(20.0, 60.0), PIECE)
    assert said.startswith("about a minute, 75% of it compilation (a guess: ") and "one call takes 2 s" in said
    assert "guess" not in told(Forecast(20.0, 0.0), PIECE)


def test_a_forecast_of_calls_that_take_as_long_as_the_piece_comes_true(model, monkeypatch):
    clock = [0.0]

    def first_token():
        clock[0] += PIECE.first
        return torch.tensor([[1]]), SimpleNamespace(get_seq_length=lambda: 9)

    arms = [arm("transformers"), arm("transformers too")]
    for each in arms:
        each.first_token, each.retain_ratio, each.beside, each.called = first_token, 1.0, 0, ()
    measure(model, arms, repeats=4, decode_tokens=0)
    monkeypatch.setattr(forecast, "_PROFILED", 0)
    said = forecast_of(arms, PIECE, frames=8, repeats=4, decode_tokens=0, layers=10, lowering="staged")
    assert said.seconds == pytest.approx(clock[0])


def test_fewer_frames_and_compressed_calls_are_shorter():
    assert forecast.share_of_work(arm("subsampling 0.25", frames=2), 8) == 0.25
    assert forecast.share_of_work(arm("earlytom 0.1", compresses=True), 8) < 1


def test_who_compiles_what():
    layers = 24
    names = ("transformers", "average pooling 0.1", "earlytom 0.1", "inductor")
    assert [compilation(name, layers, "eager") > 0 for name in names] == [False, False, True, True]
    assert compilation("earlytom 0.1", layers, "eager") < compilation("earlytom 0.1", layers, "staged")
    assert compilation("earlytom 0.1", layers, "whole") == compilation("inductor", layers, "staged")


def test_what_the_first_compilation_took_corrects_the_rest():
    layers, said = 10, Forecast(calls=200.0, compilation=100.0)
    guess = compilation("inductor", layers, "staged")
    assert forecast.corrected(said, layers, "staged", {"transformers": 99.0}) is None
    assert forecast.corrected(said, layers, "staged", {"transformers": 0.1, "inductor": 1.2 * guess}) is None
    for times in (10, 0.1):
        left = forecast.corrected(said, layers, "staged", {"transformers": 0.1, "inductor": times * guess})
        assert left == pytest.approx(200 + (100 - guess) * times)  # calls were timed, not guessed
    assert forecast.corrected(Forecast(1.0, 1.0), layers, "staged", {"inductor": 10 * guess}) == 1


def test_load_counts_every_request():
    found = forecast_of_load(
        ["transformers"], PIECE, requests=2 * (1 + 8), rounds=3, new_tokens=9, layers=4, lowering="staged"
    )
    assert found.seconds == pytest.approx(4 * 18 * (2.0 + 0.9))


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.5, "less than a minute"),
        (59, "less than a minute"),
        (61, "about a minute"),
        (200, "about 3 minutes"),
        (5000, "about 83 minutes"),
        (9000, "about 2.5 hours"),
    ],
)
def test_words(seconds, words):
    assert in_words(seconds) == words


def test_one_call_is_timed(model):
    piece = forecast.measured_piece(model, make_inputs(model, frames=2))
    assert piece.first > 0 and piece.token > 0


def test_names_are_known_before_there_is_a_model(model):
    inputs, ratios = make_inputs(model, frames=2), (0.25, 0.1)
    for options in ({"lowering": "eager"}, {"lowering": "eager", "variant": "plus"}):
        assert [arm.name for arm in make_arms(model, inputs, ratios, options)] == arm_names(ratios, options)
    assert [server.name for server in make_servers(model, ratios, {"lowering": "eager"})] == server_names(ratios)


def test_a_video_of_somebodys_is_in_every_row(model):
    pixels = torch.rand(3, 3, 24, 24)
    videos = make_inputs(model, frames=3, batch=2, video=pixels)["pixel_values_videos"]
    assert torch.equal(videos[0], pixels) and torch.equal(videos[1], pixels)
