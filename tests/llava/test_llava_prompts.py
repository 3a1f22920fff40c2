"""Prompts of LLaVA's own code: videos and images in one row, batches, padding, labels, what ``generate()`` takes."""

import pytest
import torch
from generating import trace_of_video_rows
from llava_calls import (
    CLOSE_LOGITS,
    NEWLINES,
    VARIANTS,
    WAYS_TO_REUSE,
    Call,
    check_forward,
    check_generate,
    clip,
    compiled,
    expected,
    generated,
    options_of_oracle,
    picture,
    shared,
    words,
)
from oracle_llava import compressed_logits, compressed_prompt
from tiny_llava import tiny_llava
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import earlytom_compile
from earlytom_compile import report

TEXT, VIDEO, IMAGE, CROPS = "text", "video", "image", "crops"
LAYOUTS = {
    "a video alone": [[VIDEO, TEXT]],
    "two videos and an image": [[TEXT, VIDEO, TEXT, IMAGE, VIDEO, TEXT]],
    "crops before a video": [[CROPS, TEXT, VIDEO, TEXT]],
    "rows with different numbers": [[TEXT, VIDEO, TEXT], [VIDEO, TEXT, VIDEO, IMAGE, TEXT], [TEXT, IMAGE, TEXT]],
}


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava(newline="grid", pool="average", text_layers=2)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    yield from shared(pristine, one_trace, monkeypatch)


class TestForward:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, model, layout):
        check_forward(model, Call.of(model, LAYOUTS[layout]))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_where_unchanged_patches_are_reused(self, model, layout):
        model.config.tokenizer_padding_side = "left"
        call = Call.of(model, LAYOUTS[layout], changing=0.3, left=True)
        check_forward(model, call, **WAYS_TO_REUSE["plus"])
        check_generate(model, call, **WAYS_TO_REUSE["plus"])

    @pytest.mark.parametrize("left", [True, False])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding(self, model, side, left):
        """The rows come padded on one side, and leave so on that of the configuration."""
        model.config.tokenizer_padding_side = side
        check_forward(model, Call.of(model, LAYOUTS["rows with different numbers"], left=left))

    @pytest.mark.parametrize("newline", NEWLINES)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_newlines_and_variants(self, model, newline, variant):
        model.config.mm_newline_position = newline
        check_forward(model, Call.of(model, [[TEXT, VIDEO, TEXT]]), variant=variant)

    @pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
    def test_ratios(self, model, ratio):
        check_forward(model, Call.of(model, [[TEXT, VIDEO, TEXT]]), retain_ratio=ratio)

    def test_everything_kept_is_the_models_own(self, model):
        call = Call.of(model, LAYOUTS["two videos and an image"])
        with torch.no_grad():
            own = model(**call.forward()).logits
            got = compiled(model, retain_ratio=1.0, tau_merge=2.0)(**call.forward()).logits
        torch.testing.assert_close(got, own, **CLOSE_LOGITS)

    @pytest.mark.parametrize("layout", ["two videos and an image", "rows with different numbers"])
    def test_labels(self, model, layout):
        call = Call.of(model, LAYOUTS[layout])
        labels = torch.where(call.ids < 0, -100, call.ids)
        check_forward(model, call.but(labels=labels))

    def test_a_prompt_longer_than_the_model_takes_is_cut_behind_compression(self, model):
        model.config.tokenizer_model_max_length = 150
        call = Call.of(model, [[TEXT, VIDEO, TEXT], [VIDEO, VIDEO, TEXT]])
        assert expected(model, call).embeddings.shape[1] == 150
        check_forward(model, call)

    def test_videos_as_one_tensor(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT, VIDEO]])
        prompt = expected(model, call)
        with torch.no_grad():
            logits = compiled(model)(**call.but(images=torch.stack(call.images)).forward()).logits
        torch.testing.assert_close(logits, compressed_logits(model, prompt), **CLOSE_LOGITS)

    def test_a_modality_as_a_string(self, model):
        check_forward(model, Call.of(model, [[TEXT, VIDEO, TEXT]]).but(modalities="video"))

    def test_images_behind_the_modalities_are_images(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT, IMAGE]])
        check_forward(model, call.but(modalities=["video"]))

    def test_videos_of_different_lengths(self, model):
        check_forward(model, Call.of(model, [[TEXT, VIDEO, VIDEO]], frames=(4, 7)))

    def test_arguments_by_place(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        prompt = expected(model, call)
        with torch.no_grad():
            logits = compiled(model)(call.ids, **call.arguments()).logits
        torch.testing.assert_close(logits, compressed_logits(model, prompt), **CLOSE_LOGITS)

    def test_positions_are_counted_anew(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT], [TEXT, TEXT, VIDEO]])
        positions = torch.arange(call.ids.shape[1])[None].expand(2, -1)
        prompt = compressed_prompt(model, **call.oracle(), position_ids=positions, **options_of_oracle({}))
        with torch.no_grad():
            logits = compiled(model)(**call.forward(), position_ids=positions).logits
        seen = prompt.mask.bool()
        torch.testing.assert_close(logits[seen], compressed_logits(model, prompt)[seen], **CLOSE_LOGITS)


def uncut_length(model, call):
    prepared = model.prepare_inputs_labels_for_multimodal(
        call.ids, None, call.attention_mask, None, None, call.images, call.modalities, call.image_sizes
    )
    return prepared[4].shape[1]


class TestGenerate:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, model, layout):
        model.config.tokenizer_padding_side = "left"
        check_generate(model, Call.of(model, LAYOUTS[layout], left=True))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variants(self, model, variant):
        check_generate(model, Call.of(model, [[TEXT, VIDEO, TEXT]]), variant=variant)

    def test_staged(self, model):
        check_generate(model, Call.of(model, [[TEXT, VIDEO, TEXT]]), lowering="staged")

    def test_what_the_report_says(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT, IMAGE]])
        prompt = expected(model, call)
        length = uncut_length(model, call)
        generated(compiled(model), call)
        assert report(model).to_dict()["prompt"] == [length, prompt.embeddings.shape[1]]

    def test_encoded_videos_are_given_back(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT, IMAGE, VIDEO]])
        tokens = generated(compiled(model), call)
        first, image, second = call.images
        first, second = earlytom_compile.encode_videos(model, [first, second])
        assert torch.equal(generated(model, call.but(images=[first, image, second])), tokens)

    def test_rows_of_a_video_for_another_question(self, model):
        rows = earlytom_compile.encode_videos(compiled(model), [clip(model)])
        ids = torch.tensor([words(5, 1) + [-200] + words(7, 2)])
        call = Call(ids, [clip(model)], ["video"])
        assert torch.equal(generated(model, call.but(images=rows)), generated(model, call))

    def test_text_around_the_placeholder_is_only_text(self, model):
        """LLaVA-Video writes a time instruction there."""
        ids = torch.tensor([words(40, 1) + [-200] + words(3, 2)])
        check_generate(model, Call(ids, [clip(model)], ["video"]))

    def test_beams(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        prompt = expected(model, call)
        kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
        tokens = type(model).__mro__[1].generate(model, inputs_embeds=prompt.embeddings, **kwargs)
        assert torch.equal(generated(compiled(model), call, num_beams=3), tokens)

    @pytest.mark.parametrize("layout", [[[TEXT, VIDEO, TEXT]], [[TEXT, VIDEO], [IMAGE, TEXT, VIDEO]]])
    def test_a_length_counts_the_prompt_as_it_is_without_us(self, model, layout):
        call = Call.of(model, layout)
        length = uncut_length(model, call)
        own = generated(model, call, new=None, max_length=length + 3)
        got = generated(compiled(model), call, new=None, max_length=length + 3)
        assert got.shape == own.shape and torch.equal(got, generated(model, call, new=3))

    def test_a_length_that_is_too_short_for_the_prompt(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        for kind in (model, compiled(model)):
            with pytest.raises(ValueError, match="`max_length` is set to"):
                generated(kind, call, new=None, max_length=3)

    def test_a_streamer_a_criterion_and_a_processor_see_what_they_see_without_us(self, model):
        call, seen = Call.of(model, [[TEXT, VIDEO, TEXT]]), []

        class Streamer(BaseStreamer):
            def put(self, value):
                seen[-1].append(("stream", tuple(value.shape)))

            def end(self):
                seen[-1].append("end")

        def looked(name, result):
            def look(ids, scores, **kwargs):
                seen[-1].append((name, tuple(ids.shape)))
                return result(ids, scores)

            return look

        def listened(kind):
            seen.append([])
            kwargs = {
                "streamer": Streamer(),
                "stopping_criteria": StoppingCriteriaList([looked("stop", lambda ids, _: torch.tensor([False]))]),
                "logits_processor": LogitsProcessorList([looked("logits", lambda _, scores: scores)]),
            }
            generated(kind, call, **kwargs)

        listened(model)
        listened(compiled(model))
        assert seen[0] == seen[1] and len(seen[0]) > 8

    def test_what_is_returned_in_a_dict(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        tokens = generated(compiled(model), call)
        output = generated(model, call, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(output.sequences, tokens) and len(output.scores) == 4

    def test_ids_as_inputs(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        tokens = generated(compiled(model), call)
        by_name = model.generate(inputs=call.ids, **call.arguments(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(by_name, tokens)

    def test_a_picture_of_one_row_and_a_video_of_the_next(self, model):
        model.config.tokenizer_padding_side = "left"
        check_generate(model, Call.of(model, [[TEXT, CROPS, TEXT], [VIDEO, TEXT]], left=True))

    def test_a_row_without_any_passes_over_one(self, model):
        """llava takes one entry of ``images`` for a row of text, which goes nowhere."""
        model.config.tokenizer_padding_side = "left"
        call = Call.of(model, [[TEXT, TEXT], [VIDEO, TEXT]], left=True)
        images, modalities = [picture(model), *call.images], ["image", "video"]
        check_generate(model, call.but(images=images, modalities=modalities, image_sizes=None))
