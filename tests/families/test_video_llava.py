"""Video-LLaVA: a tower for videos beside another for images, and a class token among the tokens of each frame."""

from itertools import product

import pytest
import torch
from effort import cases, diagonal
from generating import LAYOUTS, OPTIONS, compiled, new_tokens, oracle_tokens
from oracle import Options, _compress, compressed_forward, compressed_videos
from tiny_models import image_argument, tiny_video_llava, tokens_per_frame, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, report
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations.observe import observe

VARIANTS = ("paper", "released", "plus")
NOTHING_MERGES = {"retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0}


@pytest.fixture(scope="module")
def pristine():
    return tiny_video_llava(text_layers=2, seed=1)


def rows_of_videos(model, inputs, **options):
    return earlytom_compile.encode_videos(compiled(model, strict=True, **options), inputs["pixel_values_videos"])


def test_its_family(model):
    family = family_of(model)
    assert family.name == "Video-LLaVA" and family.model_class() is type(model)
    assert family.encoder_layers(model.config) == 4  # of 5
    assert family.vision_tower(model) is model.model.video_tower
    assert family.language_model(model) is model.model.language_model


@pytest.mark.parametrize("frames", [1, 5])
def test_the_rows_are_those_of_the_model_itself(model, frames):
    inputs = video_inputs(model, frames)
    with torch.no_grad():
        rows, ids = family_of(model).rows(model, inputs["pixel_values_videos"]), inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == model.config.video_token_id).unsqueeze(-1), rows)
        assert rows.shape == (frames * tokens_per_frame(model), embeds.shape[-1])
        assert torch.equal(model(inputs_embeds=embeds).logits, model(**inputs).logits)


def test_layers_that_are_not_used_cannot_merge(model):
    with pytest.raises(EarlyTomConfigError, match="layer 4 does not exist"):
        earlytom_compile.compile(model, variant="paper", merge_layers=(0, 4))


def test_a_video_of_another_size_is_named(model):
    inputs = video_inputs(model, 3)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][..., 1:]
    with pytest.raises(EarlyTomConfigError, match=r"takes \(3, 24, 24\)"):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_a_class_token_too_few_is_named(model):
    inputs = video_inputs(model, 2)
    inputs["input_ids"][:, 3] = 7
    with pytest.raises(EarlyTomConfigError, match=r"has 73 video placeholder tokens .* need 74"):
        compiled(model).generate(**inputs, max_new_tokens=1)


class TestImages:
    """They go through a tower of their own."""

    def test_their_rows_are_the_models_own(self, model):
        inputs = video_inputs(model, 4, images_per_row=(2,))
        (given,) = {"pixel_values", "pixel_values_images"} & set(inputs)
        with torch.no_grad():
            ((token, rows),) = family_of(model).other_rows(model, inputs["input_ids"], inputs)
            own = model.model.get_image_features(inputs[given], return_dict=True).pooler_output
        assert token == model.config.image_token_id and torch.equal(rows, own.flatten(0, 1))

    def test_alone_they_run_the_models_own_code(self, model):
        inputs = video_inputs(model, 4, videos_per_row=(0, 0), images_per_row=(1, 2), before=(39, 3))
        with torch.no_grad():
            logits = model(**inputs).logits
            assert torch.equal(compiled(model)(**inputs).logits, logits)
        assert report(model).to_dict()["last_call"] == "no video"

    def test_a_layer_for_both(self, model):
        """What the caller chooses for one call, it chooses for images and videos."""
        inputs = video_inputs(model, 6, images_per_row=(1,)) | {"vision_feature_layer": -3}
        keep_all = {**NOTHING_MERGES, "variant": "paper", "merge_layers": (0, 1)}
        with torch.no_grad():
            own = model(**inputs).logits
            assert not torch.equal(own, model(**{**inputs, "vision_feature_layer": -2}).logits)
            assert torch.equal(compiled(model, strict=True, **keep_all)(**inputs).logits, own)

    def test_as_features_they_are_taken(self, model):
        """As generate() of newer versions brings them."""
        inputs = video_inputs(model, 4, images_per_row=(1,))
        with torch.no_grad():
            encoded = model.model.get_image_features(inputs[image_argument(model)], return_dict=True)
            ((_, rows),) = family_of(model).other_rows(
                model, inputs["input_ids"], {"mm_encoder_outputs": {"image": encoded}}
            )
        assert rows is not encoded.pooler_output and torch.equal(rows, encoded.pooler_output.flatten(0, 1))

    def test_by_the_name_that_processors_give_them(self, model):
        """That of versions before 5.23, which newer models take and newer processors still write."""
        inputs = video_inputs(model, 6, images_per_row=(1,))
        older = {**inputs, "pixel_values_images": inputs[image_argument(model)]}
        older.pop("pixel_values", None)
        own = new_tokens(model, older)
        expected = oracle_tokens(model, inputs)
        assert torch.equal(new_tokens(compiled(model, strict=True), older), expected)
        assert torch.equal(new_tokens(compiled(model, strict=True, **NOTHING_MERGES), older), own)
        without = {**inputs, image_argument(model): torch.zeros_like(older["pixel_values_images"])}
        assert not torch.equal(new_tokens(model, without), own), "the image is of no importance, which shows nothing"

    def test_too_few_placeholders_are_the_models_own_error(self, model):
        inputs = video_inputs(model, 4, images_per_row=(1,))
        inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = 7
        for each in (model, compiled(model)):
            with torch.no_grad(), pytest.raises(ValueError, match="Image features and image tokens do not match"):
                each(**inputs)


class TestCompressed:
    @pytest.mark.parametrize("layout, variant", diagonal(LAYOUTS, VARIANTS))
    def test_tokens_are_those_of_the_oracle(self, model, layout, variant):
        inputs = video_inputs(model, 12, **LAYOUTS[layout])
        expected = oracle_tokens(model, inputs, variant=variant)
        assert torch.equal(new_tokens(compiled(model, variant=variant, strict=True), inputs), expected)
        told = report(model).to_dict()["videos"]
        oracle = compressed_videos(earlytom_compile.restore(model), inputs, **{**OPTIONS, "variant": variant})
        assert [video["tokens"] for video in told] == [[444, len(each.kept)] for each in oracle]
        assert [video["frames"] for video in told] == [[12, *each.frames_after] for each in oracle]
        if variant != "released":
            assert all(len(each.kept) == round(0.2 * 12 * 37) for each in oracle)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_logits_and_features(self, model, variant):
        inputs = video_inputs(model, 12, videos_per_row=(1, 2), images_per_row=(1, 0), left_padding=(2, 0))
        options = {**OPTIONS, "variant": variant}
        expected = compressed_forward(model, inputs, **options)
        videos = compressed_videos(model, inputs, **options)
        for got, video in zip(rows_of_videos(model, inputs, variant=variant), videos, strict=True):
            torch.testing.assert_close(got, video.features, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            logits = model(**inputs).logits
        seen = expected.cut_attention_mask.bool()
        torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "layout, variant", diagonal(["one", "images beside videos", "left padding"], ["paper", "plus"])
    )
    def test_with_everything_kept_it_is_the_model_itself(self, model, layout, variant):
        inputs = video_inputs(model, 6, **LAYOUTS[layout])
        own = new_tokens(model, inputs)
        with torch.no_grad():
            logits = model(**inputs).logits
            compiled(model, variant=variant, strict=True, **NOTHING_MERGES)
            assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(new_tokens(model, inputs), own)
        assert report(model).to_dict()["videos"][0]["tokens"] == [6 * 37, 6 * 37]

    def test_a_class_token_is_a_token_like_others(self):
        """It stays where the encoder looks at it, and goes where not."""
        model, class_tokens = tiny_video_llava(text_layers=2), {True: 0, False: 0}
        calls = [video_inputs(model, 12, seed=seed) for seed in range(4)]
        oracles = [compressed_videos(model, inputs, **{**OPTIONS, "variant": "paper"}) for inputs in calls]
        compiled(model, variant="paper", strict=True)
        for inputs, (video,) in zip(calls, oracles, strict=True):
            (rows,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
            torch.testing.assert_close(rows, video.features, atol=1e-5, rtol=1e-5)
            kept = set(map(tuple, video.kept.tolist()))
            for frame in range(video.frames_after[-1]):
                class_tokens[(frame, 0) in kept] += 1
        assert min(class_tokens.values()) > 0

    def test_one_compilation_for_all_lengths(self, unshared):
        calls = [video_inputs(unshared, frames) for frames in (12, 7, 9, 20)]
        oracles = [compressed_videos(unshared, inputs, **{**OPTIONS, "variant": "paper"}) for inputs in calls]
        compiled(unshared, variant="paper", strict=True)
        for inputs, (oracle,) in zip(calls, oracles, strict=True):
            (got,) = earlytom_compile.encode_videos(unshared, inputs["pixel_values_videos"])
            torch.testing.assert_close(got, oracle.features, atol=1e-5, rtol=1e-5)
        assert sum(graph["compressed"] for graph in report(unshared).to_dict()["compilations"]) == 1

    def test_features_of_several_layers(self):
        model = tiny_video_llava(vision_feature_layer=[-2, -1])
        inputs = video_inputs(model, 12)
        (oracle,) = compressed_videos(model, inputs, **{**OPTIONS, "variant": "paper"})
        (rows,) = rows_of_videos(model, inputs, variant="paper")
        torch.testing.assert_close(rows, oracle.features, atol=1e-5, rtol=1e-5)

    def test_lowered(self, unshared):
        inputs = video_inputs(unshared, 12)
        (oracle,) = compressed_videos(unshared, inputs, **{**OPTIONS, "variant": "paper"})
        (rows,) = rows_of_videos(unshared, inputs, variant="paper", lowering="staged")
        torch.testing.assert_close(rows, oracle.features, atol=1e-5, rtol=1e-4)

    def test_beams_of_a_model_that_keeps_everything_are_its_own(self, model):
        inputs = video_inputs(model, 6, **LAYOUTS["left padding"])
        beams = {"num_beams": 3, "num_return_sequences": 2}
        own = new_tokens(model, inputs, **beams)
        assert torch.equal(new_tokens(compiled(model, **NOTHING_MERGES), inputs, **beams), own)
        few = new_tokens(compiled(model, retain_ratio=0.2), inputs, **beams)
        assert few.shape == own.shape and not torch.equal(few, own)

    @pytest.mark.parametrize("layout", ["images beside videos", pytest.param("left padding", marks=pytest.mark.long)])
    def test_beams_have_the_scores_that_the_oracle_gives_them(self, model, layout):
        inputs = video_inputs(model, 8, **LAYOUTS[layout])
        choices = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
        told = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
        output = compiled(model, strict=True).generate(**inputs, **choices, **told)
        earlytom_compile.restore(model)
        _, rows = _compress(model, inputs, Options(**{**OPTIONS, "variant": "paper"}))
        for number, tokens in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :]):
            row = rows[number // 2]
            prompt, behind = row.embeddings[row.attention_mask.bool()], model.get_input_embeddings()(tokens[:-1])
            with torch.no_grad():
                hidden = model.model.language_model(inputs_embeds=torch.cat([prompt, behind])[None]).last_hidden_state
                likely = model.lm_head(hidden)[0, -len(tokens) :].log_softmax(-1).gather(1, tokens[:, None])
            torch.testing.assert_close(output.sequences_scores[number], likely.mean(), atol=1e-4, rtol=0)

    def test_restored_it_is_what_it_was(self, unshared):
        inputs = video_inputs(unshared, 6)
        own = new_tokens(unshared, inputs)
        assert not torch.equal(new_tokens(compiled(unshared), inputs), own)
        assert torch.equal(new_tokens(earlytom_compile.restore(unshared), inputs), own)


PLACES = 37  # 36 patches and a class token, which is computed in every frame
REUSE = {
    "plus": {"variant": "plus", "reuse": None, "merge_layers": None},
    "paper": {"variant": "paper", "reuse": True},
    "released": {"variant": "released", "reuse": True},
}


@pytest.mark.parametrize("way", REUSE)
def test_unchanged_patches_are_reused_and_class_tokens_never(model, way):
    inputs = video_inputs(model, 6, videos_per_row=(1, 1), changing=0.3)
    expected = oracle_tokens(model, inputs, **REUSE[way])
    assert torch.equal(new_tokens(compiled(model, **REUSE[way]), inputs), expected)
    for video in report(model).to_dict()["videos"]:
        first, *others = video["patches"]["by_frame"]
        assert first == PLACES and all(1 < count < PLACES for count in others) and video["frames"] == [6]


@pytest.mark.parametrize(
    "layout, variant",
    cases(
        ("images beside videos", "released"),
        among=list(product(["one", "images beside videos", "two videos in a row"], VARIANTS)),
    ),
)
def test_torch_compile(unshared, layout, variant):
    """Its code never makes frames and tokens one axis: features go into the prompt as they leave the projector."""
    inputs, options = video_inputs(unshared, 12, **LAYOUTS[layout]), {**OPTIONS, "variant": variant}
    expected = compressed_forward(unshared, inputs, **options)
    fast = torch.compile(unshared, backend="earlytom", options={"lowering": "eager", "strict": True, **options})
    with torch.no_grad():
        logits = fast(**inputs).logits
    seen = expected.cut_attention_mask.bool()
    assert logits.shape == expected.logits.shape
    torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
    assert [video["frames"][1:] for video in report(fast).to_dict()["videos"]] == expected.frames_after


@pytest.mark.parametrize("images", cases((2,), among=[(1,), (2,), (5,)]))
def test_torch_compile_leaves_images_alone(unshared, images):
    """In the graph nothing but their four axes tells them from frames."""
    inputs = video_inputs(unshared, 4, videos_per_row=(0,), images_per_row=(images,))
    fast = torch.compile(unshared, backend="earlytom", options={"lowering": "eager", **OPTIONS})
    with torch.no_grad(), pytest.warns(earlytom_compile.EarlyTomFallbackWarning, match="Images.* are never compressed"):
        torch.testing.assert_close(fast(**inputs).logits, unshared(**inputs).logits)


def test_its_tower_alone(unshared):
    pixels = video_inputs(unshared, 12)["pixel_values_videos"][0]
    encode = earlytom_compile.compile_tower(
        unshared.model.video_tower, hidden=lambda tower, x: tower(x, output_hidden_states=True).hidden_states[-2],
        lowering="eager", strict=True, **OPTIONS,
    )  # fmt: skip
    merged = encode(pixels)
    (oracle,) = compressed_videos(unshared, video_inputs(unshared, 12), **{**OPTIONS, "variant": "paper"})
    with torch.no_grad():
        features = unshared.model.multi_modal_projector(merged.hidden)
    torch.testing.assert_close(features[oracle.kept[:, 0], oracle.kept[:, 1]], oracle.features, atol=1e-5, rtol=1e-4)
    assert merged.hidden.shape == (oracle.frames_after[-1], PLACES, 32) and merged.frame_counts[0] == 12


def test_observed(unshared):
    """A class token has no place in the picture, so that tokens are a row."""
    inputs, options = video_inputs(unshared, 12), {**OPTIONS, "variant": "paper"}
    (oracle,) = compressed_videos(unshared, inputs, **options)
    (observation,) = observe(unshared, inputs["pixel_values_videos"], **options)
    assert observation.grid == (1, PLACES)
    assert [(frame, token) for frame, _, token in observation.kept] == [tuple(place) for place in oracle.kept.tolist()]
