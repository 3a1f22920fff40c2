"""What is said of a method, wherever a variant would be named."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from made_up import pictures
from oracle import compressed_videos
from plain_visionzip import keep_in_python
from tiny_models import tiny_llava_onevision, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomConfig, EarlyTomConfigError, observe, report
from earlytom_compile.cli import demo, explain
from earlytom_compile.cli.main import build_parser
from earlytom_compile.cli.options import given_options
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Kept, Method
from earlytom_compile.picture import Clip, html_page

FRAMES = 5


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=3, text_layers=1, image_size=32)


@pytest.fixture
def mine(monkeypatch):
    """Asks for nothing, and keeps the first tokens."""

    def keep(video, budget):
        size = video.features.shape[1]
        places = torch.tensor([[place // size, place % size] for place in range(budget)])
        return Kept(video.features.flatten(0, 1)[:budget], places)

    monkeypatch.setattr(registry, "_registered", {"mine": Method("mine", "A paper of mine", keep=keep)})


def zipped(features, importance, keys, budget):
    tokens, places = keep_in_python(features.tolist(), importance.tolist(), keys.tolist(), budget)
    return torch.tensor(tokens), torch.tensor(places)


@cache
def observed(model, method, reuse=None):
    inputs = video_inputs(model, FRAMES)
    (observation,) = observe(model, inputs["pixel_values_videos"], retain_ratio=0.4, method=method, reuse=reuse)
    return observation, inputs


def words(page):
    return " ".join(page.split())


def page_of(observation):
    return words(html_page([Clip("a video", pictures(FRAMES), observation)]))


@pytest.mark.parametrize("reuse", [None, True])
def test_an_observation_has_what_the_method_kept_and_what_it_went_by(model, reuse):
    observation, inputs = observed(model, method="visionzip", reuse=reuse)
    seen = []

    def keep(features, importance, keys, budget):
        seen.append(importance)
        return zipped(features, importance, keys, budget)

    (expected,) = compressed_videos(model, inputs, retain_ratio=0.4, variant="paper", keep=keep, reuse=reuse)
    size = observation.grid[1]
    assert [[frame, row * size + column] for frame, row, column in observation.kept] == expected.kept.tolist()
    torch.testing.assert_close(torch.from_numpy(observation.importance).flatten(1), seen[0], atol=1e-6, rtol=1e-4)
    assert observation.importance_decides and observation.dynamic is None and not observation.merges
    assert observation.frame_counts == (FRAMES,) and observation.origins() == tuple(((f, 1.0),) for f in range(FRAMES))
    assert (observation.reuse is not None) is bool(reuse)


def test_a_page_names_the_method_and_its_paper(model):
    page = page_of(observed(model, method="visionzip")[0])
    assert "Kept is what method visionzip keeps (VisionZip: Longer is Better but Not Necessary" in page
    assert "With method visionzip no frames merge" in page and "none merged" in page
    assert "each token receives in encoder layer 2." in page and "decides nothing" not in page
    assert "tau_seg" not in page and "variant" not in page.replace("font-variant", "")


def test_a_page_says_what_does_not_decide(model, mine):
    observation, _ = observed(model, method="mine")
    assert observation.importance is not None and not observation.importance_decides
    page = page_of(observation)
    assert 'With method="mine" it decides nothing' in page and "(A paper of mine)" in page


def test_a_page_of_a_method_that_keeps_all_of_it(model, monkeypatch):
    inside = Method("inside_only", "Another paper", inside=lambda ratio, layers: ())
    monkeypatch.setattr(registry, "_registered", {"inside_only": inside})
    observation, _ = observed(model, method="inside_only")
    assert observation.tokens[0] == observation.tokens[1] == len(set(observation.kept))
    assert "Method inside_only (Another paper) keeps every token" in page_of(observation)


def test_a_report_says_the_method_and_that_nothing_merges(model):
    compiled = earlytom_compile.compile(model, method="visionzip", retain_ratio=0.4, lowering="eager")
    try:
        earlytom_compile.encode_videos(compiled, video_inputs(model, FRAMES)["pixel_values_videos"])
        text, content = words(str(report(model))), report(model).to_dict()
    finally:
        earlytom_compile.restore(model)
    assert "retain_ratio=0.4, lowering='eager', method='visionzip', the others at their defaults" in text
    assert "(3 layers), no frames merge" in text and "variant" not in text
    assert f"video 0 frames {FRAMES}, tokens 80 -> 32" in text
    assert content["options"]["method"] == "visionzip" and content["merge_layers"] == []


@pytest.mark.parametrize(
    ("method", "said"),
    [("visionzip", "those that method visionzip keeps"), ("inside_only", "all of them, since method inside_only")],
)
def test_explain_says_who_chose(monkeypatch, method, said):
    inside = Method("inside_only", "Another paper", inside=lambda ratio, layers: ())
    monkeypatch.setattr(registry, "_registered", {"inside_only": inside})
    content = {"videos": [{"frames": [8], "tokens": [128, 13]}], "merge_layers": [], "encoder": {"layers": 4}}
    content |= {"prompt": [140, 25], "inside": [{"layer": 3, "prompt": 18}]}
    text = words(explain._findings(SimpleNamespace(report=content), EarlyTomConfig(method=method)))
    assert text.startswith("The vision encoder gets 8 frames of the video; none merge. 13 of") and said in text
    assert text.endswith("From layer 3 of the language model on, 18 of the prompt's 25 positions are left.")


@pytest.mark.parametrize(("frames", "said"), [([8], "No frames merge with this method, 8 go"), ([8, 6], "8 -> 6")])
def test_the_demo_says_how_many_frames_there_are(frames, said):
    assert said in demo._encoded({"videos": [{"frames": frames, "tokens": [128, 13]}], "full_layers": []})


def options_of(*words):
    return given_options(build_parser().parse_args(list(words)))


def test_a_command_takes_a_method_and_its_own_default_variant_gives_way():
    assert EarlyTomConfig.from_options(options_of("demo")).variant == "plus"
    taken = options_of("demo", "--method", "visionzip")
    assert taken == {"retain_ratio": 0.1, "lowering": "eager", "method": "visionzip"}
    with pytest.raises(EarlyTomConfigError, match="variant='plus' with method='visionzip'"):
        options_of("demo", "--method", "visionzip", "--variant", "plus")
    with pytest.raises(EarlyTomConfigError, match="method='visionzop': must be one of 'earlytom', "):
        options_of("demo", "--method", "visionzop")
