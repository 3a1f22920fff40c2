"""``earlytom_compile.compile(model)``: the three promises, and greedy tokens equal to the oracle's."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import compressed_forward, compressed_generate
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from torch._inductor.exc import InductorError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CompileConfig,
    DynamicCache,
    LlavaOnevisionForConditionalGeneration,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import earlytom_compile
from earlytom_compile import (
    EarlyTomCompileError,
    EarlyTomConfigError,
    EarlyTomError,
    EarlyTomFallbackWarning,
    report,
    stages,
)
from earlytom_compile.integrations import generate as in_place
from earlytom_compile.integrations.caches import cache_name, cache_of
from earlytom_compile.integrations.prefill import CompiledPrefill

NEW_NAME = cache_name(LlavaOnevisionForConditionalGeneration.forward) == "cache"
takes_features = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaOnevisionForConditionalGeneration.forward).parameters,
    reason="this transformers takes no features in place of pixels",
)
OPTIONS = {"merge_layers": (0, 2), "tau_seg": 0.3, "retain_ratio": 0.2}
NEW = 6


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava_onevision(vision_layers=4, text_layers=1)


@pytest.fixture
def model(pristine):
    yield pristine
    earlytom_compile.restore(pristine)


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", **OPTIONS, **options})


def new_tokens(model, inputs, **kwargs):
    """Generate and check the first promise: the caller's own prompt comes first."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **kwargs}
    output = model.generate(**inputs, **kwargs)
    prompt = inputs["input_ids"]
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(len(output) // len(prompt), 0))
    return output[:, prompt.shape[1] :]


def given(model, cache):
    """A cache as an argument of the model, by the name that its transformers gives it."""
    return {cache_name(model.forward): cache}


def oracle_tokens(model, inputs, **options):
    earlytom_compile.restore(model)
    return compressed_generate(model, inputs, NEW, **{"variant": "paper", **OPTIONS, **options})


LAYOUTS = {
    "one": {},
    "batch of different prompts": {"videos_per_row": (1, 1, 1), "before": (1, 6, 3), "after": (4, 1, 9)},
    "two videos in a row": {"videos_per_row": (2,)},
    "different numbers of videos": {"videos_per_row": (2, 0, 1)},
    "left padding": {"videos_per_row": (1, 1), "left_padding": (0, 7)},
    "images beside videos": {"videos_per_row": (1, 1), "images_per_row": (1, 0)},
}


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_greedy_tokens_equal_the_oracle(model, layout, variant):
    inputs = video_inputs(model, 12, **layout)
    got = new_tokens(compiled(model, variant=variant), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, variant=variant))


@pytest.mark.parametrize("variant, lowering", [("paper", "whole"), ("paper", "staged"), ("plus", "staged")])
def test_inductor_gives_the_same_tokens(model, variant, lowering):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(1, 4))
    got = new_tokens(compiled(model, variant=variant, lowering=lowering), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, variant=variant))


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_prompt_is_compiled_once_for_all_lengths(model):
    compiled(model, lowering="staged")
    first = new_tokens(model, video_inputs(model, 12, after=4))
    graphs = graphs_compiled()
    prompts = [video_inputs(model, 12, after=after, before=after % 3, seed=after) for after in (5, 9, 16, 30)]
    tokens = [new_tokens(model, inputs) for inputs in prompts]
    assert graphs_compiled() == graphs, "a prompt of another length was compiled again"
    for inputs, got in zip(prompts, tokens, strict=True):
        assert torch.equal(got, oracle_tokens(model, inputs))
    assert first.shape == (1, NEW)


def test_restore_gives_the_language_model_back(model):
    language_model = model.model.language_model
    before = dict(language_model.__dict__)
    compiled(model, lowering="staged")
    new_tokens(model, video_inputs(model, 12))
    earlytom_compile.restore(model)
    assert language_model.__dict__ == before


def test_without_a_video_the_language_model_runs_its_own_code(model):
    ids = video_inputs(model, 4, videos_per_row=(0,), after=9)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        compiled(model, lowering="staged")
        new_tokens(model, video_inputs(model, 12))
        graphs = graphs_compiled()
        assert torch.equal(model(ids).logits, expected)
    assert graphs_compiled() == graphs


def test_threads_do_not_meet(model):
    """One generates about videos, the other about nothing, which must stay bit for bit what it was."""
    text = {"input_ids": video_inputs(model, 4, videos_per_row=(0,), after=9)["input_ids"]}
    inputs = video_inputs(model, 12)
    with torch.no_grad():
        expected = model(**text).logits
        tokens = new_tokens(compiled(model, lowering="staged"), inputs)

        def ask_text():
            with torch.no_grad():
                return [torch.equal(model(**text).logits, expected) for _ in range(30)]

        with ThreadPoolExecutor(3) as pool:
            answers = pool.submit(ask_text)
            videos = [pool.submit(new_tokens, model, inputs) for _ in range(6)]
            assert all(answers.result()) and all(torch.equal(video.result(), tokens) for video in videos)
    earlytom_compile.restore(model)
    assert "forward" not in model.model.language_model.__dict__


def test_a_copy_compiles_for_itself(model):
    inputs = video_inputs(model, 12)
    tokens = new_tokens(compiled(model, lowering="staged"), inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
        twin.model.language_model.norm.weight.mul_(torch.linspace(-1, 1, len(twin.model.language_model.norm.weight)))
    got = new_tokens(twin, inputs)
    assert not torch.equal(got, tokens)
    assert torch.equal(got, oracle_tokens(twin, inputs))
    assert torch.equal(new_tokens(model, inputs), tokens)


def test_pickling_says_what_to_do(tmp_path):
    model = tiny_llava_onevision(vision_layers=2, text_layers=1)  # one that ran has hooks that do not pickle either
    with pytest.raises(EarlyTomError, match="restore"):
        torch.save(compiled(model, merge_layers=(0,)), tmp_path / "model.pt")
    torch.save(earlytom_compile.restore(model), tmp_path / "model.pt")


def test_another_torch_compile_around_it_still_compresses(model):
    inputs = video_inputs(model, 12)
    with torch.no_grad():
        expected = compiled(model)(**inputs).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)
    assert expected.shape[1] < inputs["input_ids"].shape[1]


def test_videos_given_by_position_compress_inside_another_compile(model):
    inputs = video_inputs(model, 12)
    names = list(inspect.signature(model.forward).parameters)
    place = names.index("pixel_values_videos")
    arguments = [inputs.get(name) for name in names[: place + 1]]
    with torch.no_grad():
        expected = compiled(model)(**inputs).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(*arguments).logits, expected)


def test_a_switched_off_dynamo_is_not_silent(model):
    inputs = video_inputs(model, 12)
    plain = new_tokens(model, inputs)
    for first in (True, False):  # before anything was compiled, and after
        compiled(model)
        if not first:
            new_tokens(model, inputs)
        says = pytest.warns(EarlyTomFallbackWarning, match="Dynamo did not trace")
        with torch.compiler.set_stance("force_eager"), says:
            assert torch.equal(new_tokens(model, inputs), plain)
        assert report(model).to_dict()["videos"] == []
    compiled(model, strict=True)
    with torch.compiler.set_stance("force_eager"), pytest.raises(EarlyTomCompileError, match="Dynamo did not trace"):
        new_tokens(model, inputs)


def test_chunks_of_the_prompt_are_a_reason(model):
    inputs = video_inputs(model, 12)
    plain = new_tokens(model, inputs, prefill_chunk_size=16)
    with pytest.warns(EarlyTomFallbackWarning, match="prefill_chunk_size"):
        assert torch.equal(new_tokens(compiled(model), inputs, prefill_chunk_size=16), plain)


def test_the_compiled_prompt_is_in_the_report(model):
    new_tokens(compiled(model, lowering="staged"), video_inputs(model, 12))
    content = report(model).to_dict()
    assert content["graphs"] == 2 and content["recompiles"] == 0 and content["reasons"] == []


def test_compile_llm_can_be_turned_off(model):
    inputs = video_inputs(model, 12)
    compiled(model, lowering="staged", compile_llm=False)
    got = new_tokens(model, inputs)
    assert graphs_compiled() == 1  # the vision path
    assert torch.equal(got, oracle_tokens(model, inputs))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_rows_of_one_batch_size_compile_for_all(model, padded):
    """One graph for the vision path, and one for the prompts: of 2, 3 and 4 rows, padded or not."""
    compiled(model, lowering="staged")
    for rows in (2, 3, 4):
        for after in (5, 9, 12):
            before = range(1, rows + 1) if padded else 2
            inputs = video_inputs(model, 12, videos_per_row=(1,) * rows, before=before, after=after, seed=after)
            assert bool(inputs["attention_mask"].all()) is not padded
            got = new_tokens(model, inputs, max_new_tokens=2)
            assert graphs_compiled() == 2, f"{rows} rows with {after} tokens after the video were compiled again"
            if after == 9:
                with torch.no_grad():
                    expected = compressed_generate(model, inputs, 2, variant="paper", **OPTIONS)
                assert torch.equal(got, expected)
    other = video_inputs(model, 12, videos_per_row=(1, 1), before=2 if padded else (1, 2))
    new_tokens(model, other, max_new_tokens=2)
    assert graphs_compiled() == 3, "with a mask the code is another than without, once"


@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_the_prompt_is_lowered_as_the_vision_path_is(monkeypatch, lowering):
    model, lowered = tiny_llava_onevision(vision_layers=4, text_layers=4), []
    monkeypatch.setattr(stages, "lower", lambda *args: lowered.append(args[2]) or args[0].forward)
    inputs = video_inputs(model, 12)
    new_tokens(compiled(model, lowering=lowering, compile_llm=False), inputs)
    vision = len(lowered)
    got = new_tokens(compiled(model, lowering=lowering), inputs)
    prompt = len(lowered) - 2 * vision
    assert (vision == prompt == 1) if lowering == "whole" else (vision > prompt > 1)
    assert [record.lowering for record in report(model).records] == [lowering] * 2
    assert torch.equal(got, oracle_tokens(model, inputs))


def test_a_prompt_that_inductor_cannot_compile_runs_as_it_is(model, monkeypatch):
    def refuse(*args):
        raise InductorError(RuntimeError("no compiler"), None)

    inputs = video_inputs(model, 12)
    monkeypatch.setattr(stages, "lower", refuse)
    with pytest.warns(EarlyTomFallbackWarning, match="the whole graph.*no compiler"):
        got = new_tokens(compiled(model, lowering="whole"), inputs)
    assert [record.lowering for record in report(model).records] == ["eager"] * 2
    assert torch.equal(got, oracle_tokens(model, inputs))


def test_cuda_graphs_need_pieces(model, monkeypatch):
    given = []
    monkeypatch.setattr(stages, "lower", lambda *args: given.append(args[3]) or args[0].forward)
    new_tokens(compiled(model, lowering="whole", mode="reduce-overhead"), video_inputs(model, 12))
    assert len(given) == 2 and not any(options.get("triton.cudagraphs") for options in given)
    assert all("CUDA graphs" in record.reasons[0] for record in report(model).records)


class HostReads(TorchDispatchMode):
    """Notes what the host reads of tensors that a GPU would hold: those given, and what is computed from them."""

    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self, tensors):
        super().__init__()
        self.memory = {}
        self.found = []
        self.hold(tensors)

    def hold(self, values):
        for x in tree_leaves(values):
            if isinstance(x, torch.Tensor):  # kept alive, so that no other gets its address
                self.memory[x.untyped_storage()._cdata] = x.untyped_storage()

    def holds(self, values):
        storages = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return any(storage._cdata in self.memory for storage in storages)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.holds((args, kwargs)):
            self.hold(out)
            if function in self.READS:
                self.found.append(str(function))
        return out


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("layout", [{}, LAYOUTS["left padding"], LAYOUTS["images beside videos"]])
def test_between_encoder_and_prompt_the_host_reads_nothing(model, monkeypatch, layout, with_mask):
    """On a GPU a read there waits for the whole encoder. What generate() reads itself (its end token, its mask) is
    not ours, so this is forward(), up to the language model."""
    inputs = video_inputs(model, 12, **layout)
    if not with_mask:
        del inputs["attention_mask"]
    reads = HostReads([inputs, dict(model.named_parameters())])
    encode, tolist, reached = in_place.CompiledModel._encode, torch.Tensor.tolist, []
    entered = []

    def stop():
        while entered:
            reads.__exit__(None, None, None)
            entered.pop()

    def encode_then_watch(*args):
        stop()
        rows, before = encode(*args)
        reads.hold(rows)
        entered.append(reads.__enter__())
        return rows, before

    def watched_tolist(x):
        if entered and reads.holds(x):
            reads.found.append("tolist")
        return tolist(x)

    def language_model(prefill, kwargs):
        stop()
        reached.append(kwargs["inputs_embeds"].shape)
        return lambda own, args, kwargs: own(*args, **kwargs)

    def sent(x, device):
        moved = x.clone()
        reads.hold(moved)
        return moved

    monkeypatch.setattr(stages, "lower", lambda *args: args[0].forward)
    monkeypatch.setattr(in_place.CompiledModel, "_encode", encode_then_watch)
    monkeypatch.setattr(in_place, "without_waiting", sent)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # else what is on the host is what is on the device
    monkeypatch.setattr(torch.Tensor, "tolist", watched_tolist)
    monkeypatch.setattr(CompiledPrefill, "_compiled_for", language_model)
    compiled(model, lowering="staged")
    with torch.no_grad():
        model(**inputs)
    assert len(reached) == 1 and reads.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [{}, LAYOUTS["left padding"], LAYOUTS["images beside videos"]])
def test_between_encoder_and_prompt_a_gpu_is_not_waited_for(monkeypatch, layout):
    model = tiny_llava_onevision(vision_layers=4, text_layers=1).cuda()
    inputs = video_inputs(model, 12, **layout)
    encode, reached = in_place.CompiledModel._encode, []

    def encode_then_watch(*args):
        torch.cuda.set_sync_debug_mode("default")
        encoded = encode(*args)
        torch.cuda.set_sync_debug_mode("error")
        return encoded

    def language_model(prefill, kwargs):
        torch.cuda.set_sync_debug_mode("default")
        reached.append(kwargs["inputs_embeds"].shape)
        return lambda own, args, kwargs: own(*args, **kwargs)

    monkeypatch.setattr(stages, "lower", lambda *args: args[0].forward)
    monkeypatch.setattr(in_place.CompiledModel, "_encode", encode_then_watch)
    monkeypatch.setattr(CompiledPrefill, "_compiled_for", language_model)
    try:
        with torch.no_grad():
            compiled(model, lowering="staged")(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reached) == 1


def test_decoding_that_transformers_compiles_itself_stays_compiled(model):
    """Its static caches grow until the second length: from then on nothing is compiled anew, prompt or decoding."""
    decoding = CompileConfig(backend="eager", mode=None, fullgraph=True)
    decoding._compile_all_devices = True  # not only on a GPU
    prompts = [video_inputs(model, 12, after=after, before=2, seed=after) for after in (4, 14, 30)]
    compiled(model, lowering="staged")
    expected = [new_tokens(model, inputs) for inputs in prompts]
    graphs = [graphs_compiled()]
    try:
        for inputs, tokens in zip(prompts, expected, strict=True):
            got = new_tokens(model, inputs, cache_implementation="static", compile_config=decoding)
            assert torch.equal(got, tokens)
            graphs.append(graphs_compiled())
    finally:
        for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            model.__dict__.pop(name, None)  # transformers keeps them, and the model is that of all tests
    assert graphs[0] < graphs[1] < graphs[2] == graphs[3]


def test_a_static_cache_and_a_compiled_prompt(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(1, 4))
    got = new_tokens(compiled(model, lowering="staged"), inputs, cache_implementation="static")
    assert torch.equal(got, oracle_tokens(model, inputs))


def test_decoding_compiled_by_somebody_else_sees_the_model_alone(model):
    """As transformers does for static caches on a GPU: one step through torch.compile, in one graph."""
    inputs = video_inputs(model, 12)
    compiled(model)
    expected = new_tokens(model, inputs)
    cache = DynamicCache(config=model.config.text_config)
    step = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, **given(model, cache))
    position = torch.tensor([[cache.get_seq_length()]])
    with torch.no_grad():
        decode = torch.compile(model.__call__, backend="eager", fullgraph=True)
        logits = decode(input_ids=step[:, -1:], position_ids=position, **given(model, cache)).logits
    assert logits[:, -1].argmax(-1) == expected[:, 1]


def test_each_row_equals_that_row_alone(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2, 1), before=(1, 6, 3))
    together = new_tokens(compiled(model), inputs)
    first_video = 0
    for row, videos in enumerate((1, 2, 1)):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values_videos": inputs["pixel_values_videos"][first_video : first_video + videos],
        }
        first_video += videos
        assert torch.equal(new_tokens(model, alone)[0], together[row])


def test_prompts_of_other_lengths_do_not_recompile(model):
    compiled(model)
    for seed, after in enumerate((4, 9, 30, 2)):
        new_tokens(model, video_inputs(model, 12, after=after, seed=seed))
        new_tokens(model, video_inputs(model, 12, videos_per_row=(1, 1), after=after, seed=seed))
    content = report(model).to_dict()
    assert (content["graphs"], content["recompiles"]) == (1, 0)
    new_tokens(model, video_inputs(model, 8))
    assert report(model).to_dict()["graphs"] == 2


def test_many_frame_counts_stay_compressed(model):
    """More shapes than Dynamo's recompile limit: each has a compiled function of its own."""
    compiled(model)
    for frames in range(1, 13):
        new_tokens(model, video_inputs(model, frames), max_new_tokens=1)
        (video,) = report(model).to_dict()["videos"]
        assert video["tokens"][1] == max(1, round(0.2 * frames * tokens_per_frame(model)))


def test_beams(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(2, 5))
    compiled(model)
    both = new_tokens(model, inputs, num_beams=3, num_return_sequences=2)
    assert len(both) == 4
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values_videos": inputs["pixel_values_videos"][row : row + 1],
        }
        assert torch.equal(new_tokens(model, alone, num_beams=3, num_return_sequences=2), both[2 * row : 2 * row + 2])


def test_num_return_sequences_when_sampling(model):
    inputs = video_inputs(model, 12)
    torch.manual_seed(0)
    got = new_tokens(compiled(model), inputs, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert got.shape == (3, NEW) and len({tuple(row.tolist()) for row in got}) > 1


def test_streamer_sees_the_callers_prompt_and_every_token(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            self.ended = True

    inputs, streamer = video_inputs(model, 12), Collect()
    got = new_tokens(compiled(model), inputs, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.seen[0], inputs["input_ids"][0])
    assert torch.equal(torch.cat(streamer.seen[1:]), got[0])


def test_dict_output_and_input_as_first_argument(model):
    inputs = video_inputs(model, 12)
    compiled(model)
    ids = inputs.pop("input_ids")
    output = model.generate(
        ids, **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids) and len(output.scores) == NEW


@pytest.mark.parametrize("give", ["argument", "config", "model"])
def test_max_length_counts_the_callers_prompt(model, give):
    inputs = video_inputs(model, 12)
    limit = inputs["input_ids"].shape[1] + 4
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample, config.pad_token_id = limit, False, 0
    kwargs = {"argument": {"max_length": limit, "do_sample": False}, "config": {"generation_config": config}}
    own, model.generation_config = model.generation_config, config if give == "model" else model.generation_config
    try:
        assert compiled(model).generate(**inputs, **kwargs.get(give, {})).shape[1] == limit
    finally:
        model.generation_config = own


def test_stopping_criteria_and_logits_processors_see_the_callers_prompt(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(1, 4))
    length, seen = inputs["input_ids"].shape[1], []

    def stop_after_two(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= length + 2)

    def look(ids, scores):
        seen.append(ids[:, :length])
        return scores

    def only(row, ids):
        assert torch.equal(ids[:length], inputs["input_ids"][row])
        return [7]

    got = new_tokens(
        compiled(model),
        inputs,
        stopping_criteria=StoppingCriteriaList([stop_after_two]),
        logits_processor=LogitsProcessorList([look]),
        prefix_allowed_tokens_fn=only,
    )
    assert got.tolist() == [[7, 7], [7, 7]]
    assert all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


def test_the_next_turn_cannot_continue_a_cut_cache(model):
    inputs = video_inputs(model, 12)
    output = compiled(model).generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EarlyTomConfigError, match="Start the next turn without a cache"):
        model.generate(input_ids=output.sequences, max_new_tokens=2, **given(model, cache_of(output)))


def test_a_filled_cache_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    with torch.no_grad():
        cache = cache_of(model(inputs["input_ids"][:, :2], use_cache=True))
    with pytest.warns(EarlyTomFallbackWarning, match="already filled"):
        compiled(model).generate(**inputs, max_new_tokens=1, **given(model, cache))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_names_that_transformers_deprecates_are_not_used(model):
    inputs = video_inputs(model, 12)
    first = compiled(model, lowering="staged").generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert cache_of(first).get_seq_length() < inputs["input_ids"].shape[1]
    with torch.no_grad():
        model(**inputs)


@pytest.mark.skipif(not NEW_NAME, reason="transformers before 5.24 has one name only")
def test_a_cache_by_its_old_name_is_seen(model):
    inputs = video_inputs(model, 12)
    output = compiled(model).generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EarlyTomConfigError, match="Start the next turn without a cache"):
        model.generate(input_ids=output.sequences, past_key_values=cache_of(output), max_new_tokens=2)


# --- Features that the caller encoded before the call ---------------------------------------------


def video_features(model, inputs):
    videos = inputs.pop("pixel_values_videos")
    with torch.no_grad():
        return {"video": model.model.get_video_features(videos, return_dict=True)}


@takes_features
@pytest.mark.parametrize("call", ["generate", "forward", "forward in another compile"])
def test_features_of_a_video_run_uncompressed_and_say_so(model, call):
    inputs = video_inputs(model, 12)
    inputs["mm_encoder_outputs"] = video_features(model, inputs)

    def run():
        if call == "generate":
            return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        torch._dynamo.reset()
        with torch.no_grad():
            return (model if call == "forward" else torch.compile(model, backend="eager"))(**inputs).logits

    expected = run()
    compiled(model)
    with pytest.warns(EarlyTomFallbackWarning, match="given as features"):
        torch.testing.assert_close(run(), expected)
    assert "given as features" in report(model).to_dict()["reasons"][0]
    compiled(model, strict=True)
    with pytest.raises(EarlyTomCompileError, match="Pass pixel_values_videos"):
        run()


@takes_features
def test_features_of_an_image_beside_a_video(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), images_per_row=(1, 0))
    expected = new_tokens(compiled(model), inputs)
    names = ("pixel_values", "image_sizes")
    with torch.no_grad():
        image = model.model.get_image_features(**{name: inputs.pop(name) for name in names}, return_dict=True)
    assert torch.equal(new_tokens(model, inputs, mm_encoder_outputs={"image": image}), expected)


@takes_features
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_pixels_and_features_of_one_video_are_refused_by_the_model(model, call):
    inputs = video_inputs(model, 12)
    inputs["mm_encoder_outputs"] = video_features(model, dict(inputs))
    with pytest.raises(ValueError, match="You cannot"):
        getattr(compiled(model), call)(**inputs)


@takes_features
def test_an_uncompressed_generate_gives_one_reason(model):
    """It encodes the video by itself and hands the features to forward()."""
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    with pytest.warns(EarlyTomFallbackWarning) as warned:
        new_tokens(compiled(model), inputs)
    assert len(warned) == 1 and len(report(model).to_dict()["reasons"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": lambda x: x[0]}, r"must be \[videos, frames, channels, height, width\]"),
        ({"input_ids": lambda x: x[0]}, r"must be \[rows, prompt length\]"),
        ({"attention_mask": lambda x: x[:, 1:]}, "attention_mask has shape"),
    ],
)
def test_inputs_of_the_wrong_shape(model, change, message):
    inputs = video_inputs(model, 12)
    for name, spoil in change.items():
        inputs[name] = spoil(inputs[name])
    with pytest.raises(EarlyTomConfigError, match=message):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_without_attention_mask(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2))
    alone = video_inputs(model, 12)
    del alone["attention_mask"]
    compiled(model)
    new_tokens(model, alone)
    assert new_tokens(model, inputs).shape == (2, NEW)


# --- The other two promises -----------------------------------------------------------------------


def test_restore_undoes_it_exactly(model):
    inputs, before = video_inputs(model, 12), dict(model.__dict__)
    with torch.no_grad():
        logits = model(**inputs).logits
    compiled(model)
    new_tokens(model, inputs)
    assert earlytom_compile.restore(model) is model
    assert model.__dict__ == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert earlytom_compile.restore(model) is model


def test_restore_keeps_methods_that_were_already_replaced(model):
    def forward(*args, **kwargs):
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    try:
        compiled(model)
        earlytom_compile.restore(model)
        assert model.__dict__["forward"] is forward
    finally:
        del model.forward


@pytest.mark.parametrize("layout", [{"videos_per_row": (0,)}, {"videos_per_row": (0,), "images_per_row": (1,)}])
def test_calls_without_a_video_are_bit_for_bit_as_before(model, layout):
    inputs = video_inputs(model, 12, **layout)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = new_tokens(model, inputs)
    compiled(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(new_tokens(model, inputs), tokens)
    assert report(model).to_dict()["graphs"] == 0


def test_forward_in_place_equals_the_oracle(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2), before=(2, 4))
    with torch.no_grad():
        logits = compiled(model)(**inputs).logits
        earlytom_compile.restore(model)
        expected = compressed_forward(model, inputs, variant="paper", **OPTIONS)
    mask = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)


def test_position_ids_given_close_the_gap_in_place(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2), before=(2, 4))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = compressed_forward(model, {**inputs, "position_ids": positions}, variant="paper", **OPTIONS)
        logits = compiled(model)(**inputs, position_ids=positions).logits
    mask = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)


def test_compiling_again_replaces_the_options(model):
    inputs = video_inputs(model, 12)
    compiled(model, retain_ratio=0.5)
    new_tokens(model, inputs)
    compiled(model, retain_ratio=0.1)
    new_tokens(model, inputs)
    (video,) = report(model).to_dict()["videos"]
    assert video["tokens"][1] == round(0.1 * 12 * tokens_per_frame(model))


def test_a_copy_is_compiled_on_its_own(model):
    inputs = video_inputs(model, 12)
    original = new_tokens(compiled(model), inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert not torch.equal(new_tokens(other, inputs), original)
    assert torch.equal(new_tokens(model, inputs), original)
    earlytom_compile.restore(other)


def test_state_dict_is_untouched(model):
    keys = list(model.state_dict())
    assert list(compiled(model).state_dict()) == keys


# --- Errors and fallbacks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retian_ratio": 0.1}, "did you mean 'retain_ratio'"),
        ({"retain_ratio": 0.0}, r"\(0, 1\]"),
        ({"merge_layers": (2, 4)}, "layer 4 does not exist; the vision encoder has layers 0 to 3"),
    ],
)
def test_bad_options_raise_at_compile_time_and_change_nothing(model, options, message):
    before = dict(model.__dict__)
    with pytest.raises(EarlyTomConfigError, match=message):
        earlytom_compile.compile(model, **options)
    assert model.__dict__ == before


def test_model_of_another_kind():
    with pytest.raises(EarlyTomConfigError, match="got Linear"):
        earlytom_compile.compile(torch.nn.Linear(2, 2))


def test_placeholders_that_do_not_match(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, 0] = model.config.video_token_id
    with pytest.raises(EarlyTomConfigError, match="has 109 video placeholder tokens.*need 109".replace("109", r"\d+")):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_text_inside_a_video_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    expected = new_tokens(model, inputs)
    with pytest.warns(EarlyTomFallbackWarning, match="not next to each other"):
        assert torch.equal(new_tokens(compiled(model), inputs), expected)
    content = report(model).to_dict()
    assert content["videos"] == [] and content["prompt"] is None
    assert "not next to each other" in content["reasons"][0]


def test_grad_mode_forward_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    with pytest.warns(EarlyTomFallbackWarning, match="gradients are enabled"):
        compiled(model)(**inputs).logits.sum().backward()
    model.zero_grad(set_to_none=True)


def test_strict(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    with pytest.raises(EarlyTomCompileError, match="not next to each other"):
        compiled(model, strict=True).generate(**inputs, max_new_tokens=1)
