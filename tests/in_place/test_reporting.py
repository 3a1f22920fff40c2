"""What ``report()`` says of a model at each moment of its life, for people, notebooks and programs."""

import copy
import dataclasses
import html
import logging
import re
from html.parser import HTMLParser

import pytest
import torch
from effort import examples
from generating import OPTIONS, compiled, new_tokens
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tokens_per_frame, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomConfig, EarlyTomConfigError, EarlyTomFallbackWarning, reporting
from earlytom_compile.reporting import GraphRecord, Report, report


def test_the_states_in_their_order(model):
    seen = [report(model)]
    compiled(model)
    seen.append(report(model))
    new_tokens(model, video_inputs(model, 12, videos_per_row=(0,)))
    seen.append(report(model))
    new_tokens(model, video_inputs(model, 12))
    seen.append(report(model))
    earlytom_compile.restore(model)
    seen.append(report(model))
    compiled(model)
    seen.append(report(model))
    states = ["never compiled", "compiled, not called yet", "called, nothing compressed so far", "compressing"]
    assert [one.to_dict()["state"] for one in seen] == [*states, "restored", states[1]]
    assert len({str(one) for one in seen[:5]}) == 5 and str(seen[5]) == str(seen[1])
    assert [one.to_dict()["options"] is None for one in seen] == [True, False, False, False, True, False]
    assert all(str(one).startswith("state ") for one in seen)


def test_a_copy_has_not_been_called(model):
    new_tokens(compiled(model), video_inputs(model, 12))
    assert report(copy.deepcopy(model)).to_dict()["state"] == "compiled, not called yet"


def test_after_a_call_without_a_video_the_last_videos_numbers_are_gone(model):
    new_tokens(compiled(model), video_inputs(model, 12))
    before = report(model).to_dict()
    assert before["last_call"] == "compressed" and len(before["videos"]) == 1
    new_tokens(model, video_inputs(model, 12, videos_per_row=(0,)))
    content = report(model).to_dict()
    assert (content["last_call"], content["videos"], content["prompt"]) == ("no video", [], None)
    assert content["state"] == "compressing"
    assert "video 0" not in str(report(model)) and "no video" in str(report(model))


@torch.no_grad()
def test_steps_behind_a_prompt_keep_its_numbers(model):
    inputs = video_inputs(model, 12)
    output = compiled(model)(**inputs, use_cache=True)
    before = report(model).to_dict()["videos"]
    cache = earlytom_compile.integrations.caches.cache_of(output)
    name = earlytom_compile.integrations.caches.cache_name(model.forward)
    model(output.logits[:, -1:].argmax(-1), **{name: cache})
    assert before and report(model).to_dict()["videos"] == before


def test_what_ran_uncompressed_or_failed_is_said(model):
    new_tokens(compiled(model), video_inputs(model, 12))
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    with pytest.warns(EarlyTomFallbackWarning):
        new_tokens(model, inputs)
    assert report(model).to_dict()["last_call"] == "uncompressed" and "kept all tokens" in str(report(model))
    with pytest.raises(EarlyTomConfigError):
        new_tokens(model, {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][0]})
    assert report(model).to_dict()["last_call"] == "failed"


def test_encoding_for_later_is_a_call(model):
    videos = video_inputs(model, 12)["pixel_values_videos"]
    earlytom_compile.encode_videos(compiled(model), videos)
    content = report(model).to_dict()
    assert content["last_call"] == "encoded" and content["videos"][0]["tokens"][0] == 12 * tokens_per_frame(model)


def test_the_options_in_force(model):
    compiled(model, variant="plus", retain_ratio=0.3)
    config = EarlyTomConfig(lowering="eager", **{**OPTIONS, "variant": "plus", "retain_ratio": 0.3})
    assert report(model).to_dict()["options"] == dataclasses.asdict(config)
    options = next(line for line in str(report(model)).splitlines() if line.startswith("options"))
    for part in ("retain_ratio=0.3", "variant='plus'", "merge_layers=(0, 2)", "lowering='eager'"):
        assert part in options
    assert "alpha" not in options


# --- torch.compile(model, backend="earlytom") -----------------------------------------------------


@torch.no_grad()
def test_the_plain_spelling_and_the_model_inside(pristine):
    torch._dynamo.reset()
    options = {"lowering": "eager", **OPTIONS}
    fast = torch.compile(pristine, backend="earlytom", options=options, dynamic=False)
    before = report(fast).to_dict()
    assert before["state"] == "compiled, not called yet" and before["options"]["tau_seg"] == OPTIONS["tau_seg"]
    inputs = video_inputs(pristine, 12)
    fast(**inputs)
    for given_model in (fast, pristine, pristine.model):
        content = report(given_model).to_dict()
        assert (content["state"], content["last_call"]) == ("compressing", "compressed")
        assert content["options"] == before["options"] and len(content["videos"]) == 1
    ids = inputs["input_ids"][:, :3]
    with pytest.warns(EarlyTomFallbackWarning):
        fast(input_ids=ids, attention_mask=torch.ones_like(ids))
    content = report(fast).to_dict()
    assert content["videos"] == [] and content["prompt"] is None and content["last_call"] == "uncompressed"
    fast(**inputs)
    assert len(report(fast).to_dict()["videos"]) == 1


@pytest.mark.parametrize("spelling", ["torch.compile", "model.compile"])
def test_compiled_in_either_plain_spelling_and_not_called(spelling):
    model, options = torch.nn.Linear(2, 2), {"retain_ratio": 0.3}
    if spelling == "torch.compile":
        model = torch.compile(model, backend="earlytom", options=options)
    else:
        model.compile(backend="earlytom", options=options)
    content = report(model).to_dict()
    assert content["state"] == "compiled, not called yet" and content["options"]["retain_ratio"] == 0.3


def test_around_a_model_compiled_in_place(model):
    new_tokens(compiled(model), video_inputs(model, 12))
    for around in (torch.nn.Sequential(model), torch.compile(model, backend="eager")):
        assert report(around).to_dict() == report(model).to_dict()


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (None, "NoneType"),
        ("model", "str"),
        (torch.nn.Linear(2, 2), "Linear"),
        (torch.nn.Linear, "the class Linear"),
        (torch.compile(torch.nn.Linear(2, 2), backend="eager"), "OptimizedModule"),
    ],
)
def test_what_was_never_ours_is_an_error_that_names_it(thing, name):
    with pytest.raises(EarlyTomConfigError, match=rf"report\(\) got .*{name}.*earlytom_compile.compile\(\)"):
        report(thing)


# --- Compilations ---------------------------------------------------------------------------------


def record(**fields):
    return GraphRecord(**{"compile_id": "0/0", "recompile": False, **fields})


def test_every_compilation_is_listed_with_its_cause():
    records = (
        record(encoder="tower", inserted={"merge_frames": 2}, seconds={"lowering": 1.5, "passes": 0.25}),
        record(compile_id="1/0", seconds={"language model": 2.0}),
        record(compile_id="1/1", recompile=True, cause="rows 1 -> 2", seconds={"language model": 0.5}),
    )
    content = Report(records).to_dict()
    assert content["compilations"] == [
        {"id": "0/0", "part": "video", "compressed": True, "recompile": False, "cause": "", "seconds": 1.75},
        {"id": "1/0", "part": "prompt", "compressed": False, "recompile": False, "cause": "", "seconds": 2.0},
        {
            "id": "1/1", "part": "prompt", "compressed": False, "recompile": True, "cause": "rows 1 -> 2",
            "seconds": 0.5,
        },
    ]  # fmt: skip
    assert content["graphs"] == len(content["compilations"]) and content["recompiles"] == 1
    assert "prompt again, 0.5 s: rows 1 -> 2" in str(Report(records))


def test_a_long_compilation_says_so_in_the_log(model, caplog):
    caplog.set_level(logging.INFO, logger="earlytom_compile")
    with reporting.progress("piece 2 of 5"):
        pass
    first, last = caplog.messages
    assert first == "piece 2 of 5 ..." and re.fullmatch(r"piece 2 of 5: \d+\.\d s", last)


# --- For people -----------------------------------------------------------------------------------


class Cells(HTMLParser):
    """Text of the cells; anything that is not a plain table is an error."""

    def __init__(self):
        super().__init__()
        self.cells, self.open = [], []

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "tbody", "tr", "th", "td") and all(name in ("style", "aria-label") for name, _ in attrs)
        self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert self.open[-1] in ("th", "td")
        self.cells[-1] += data


@examples(30)
@given(st.lists(st.text(min_size=1).filter(lambda text: "\r" not in text and "\0" not in text), max_size=3))
def test_the_table_of_a_notebook_says_what_the_text_says(reasons):
    content = Report((record(reasons=reasons),), state="compressing", config=EarlyTomConfig(), last_call="compressed")
    parser = Cells()
    parser.feed(content._repr_html_())
    parser.close()
    lines = list(zip(parser.cells[::2], parser.cells[1::2], strict=True))
    assert not parser.open
    assert "\n".join(f"{heading:16} {text}" for heading, text in lines) == str(content)
    assert [text for heading, text in lines if heading == "left alone"] == list(dict.fromkeys(reasons))


def test_repr_is_for_people_and_html_is_escaped():
    content = Report((record(reasons=["<script>alert(1)</script>"]),))
    assert repr(content) == str(content) and "Report(" not in repr(content)
    assert html.escape("<script>alert(1)</script>") in content._repr_html_()
    assert "<script>" not in content._repr_html_()
