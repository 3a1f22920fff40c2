"""A family of another package, for a model that has nothing to do with transformers."""

import importlib.metadata
import re
import warnings

import pytest
import torch
from effort import diagonal
from handwritten import PATCH, SIDE, VIDEO, HandWritten, VideoModel
from oracle import MergingEncoder, Options, encoder_of
from scenes import standing_camera
from tiny_models import video

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.families.base import Family
from earlytom_compile.families.registry import BUILT_IN, all_families, family_of
from earlytom_compile.integrations.observe import observe
from earlytom_compile.reference import select_representatives, select_tokens

OPTIONS = {"retain_ratio": 0.2, "variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3}
TOKENS = 9  # of a frame


def install(folder, monkeypatch, family="handwritten:HandWritten"):
    """What pip leaves of a package whose pyproject.toml has an entry point of ours."""
    info = folder / "video_models_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: video-models-of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[earlytom_compile.families]\nmine = {family}\n")
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()


@pytest.fixture
def model(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    return VideoModel().eval()


def clips(*frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [video(count, SIDE, scenes=2, generator=generator) for count in frames]


def prompt(*frames, before=2, after=3):
    words = torch.arange(before + after) + 3
    videos = [torch.full((count * TOKENS,), VIDEO) for count in frames]
    between = [part for each in videos for part in (each, words[:1])][:-1]
    return torch.cat([words[:before], *between, words[before:]])[None]


@torch.no_grad()
def oracle_rows(model, clip, variant="paper", **more):
    """[K, C] of one video [F, 3, H, W], by hooks on the model's own layers."""
    options = Options(**{**OPTIONS, "variant": variant, **more})
    encoder = encoder_of(model.layers, OPTIONS["merge_layers"], clip, PATCH, options)
    with encoder.hooked():
        model.encode(clip)
    side = int(encoder.importance.shape[1] ** 0.5)
    importance = torch.nn.functional.avg_pool2d(encoder.importance.view(-1, 1, side, side), 2).flatten(1)
    features = model.pool(encoder.output)
    if variant == "plus":
        kept = select_representatives(features, frames_in=len(clip), retain_ratio=0.2)
    else:
        kept = select_tokens(importance, encoder.segments, frames_in=len(clip), retain_ratio=0.2, variant=variant)
    return features[kept[:, 0], kept[:, 1]]


@torch.no_grad()
def test_the_oracle_takes_importance_from_a_function_too():
    """As docs/adding-a-model.md says, for attention of any other make."""
    model, (clip,) = VideoModel().eval(), clips(6)

    def received(layer, x):
        attention, h = layer.self_attn, layer.before(x)
        heads = attention.num_heads, attention.head_dim
        q, k = (p(h).unflatten(-1, heads).transpose(1, 2) for p in attention.projections()[:2])
        return (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean((1, 2))

    options = Options(0.2, "paper", tau_seg=0.3)
    encoders = [MergingEncoder(model.layers, (0, 2), 6, options, function) for function in (None, received)]
    for encoder in encoders:
        with encoder.hooked():
            model.encode(clip)
    assert torch.equal(encoders[0].output, encoders[1].output)
    torch.testing.assert_close(encoders[0].importance, encoders[1].importance)


@torch.no_grad()
def oracle_embeddings(model, tokens, *videos):
    """[1, S', C] of a row."""
    remaining, parts, last = list(videos), [], None
    for token in tokens[0].tolist():
        if token != VIDEO:
            parts.append(model.words.weight[token][None])
        elif last != VIDEO:
            parts.append(oracle_rows(model, remaining.pop(0)))
        last = token
    return torch.cat(parts)[None]


def test_generate_and_forward_equal_the_oracle(model):
    (clip,), tokens = clips(12), prompt(12)
    embeddings = oracle_embeddings(model, tokens, clip)
    plain = model.generate(tokens, embeddings=embeddings, new=6)
    logits = model(embeddings=embeddings)
    own = model.forward, model.generate
    earlytom_compile.compile(model, lowering="eager", **OPTIONS)
    assert torch.equal(model.generate(tokens, clip[None], new=6), plain)
    assert torch.equal(model.generate(tokens=tokens, video=clip[None], new=6), plain)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, video=clip[None]), logits, atol=1e-5, rtol=1e-5)
    assert report(model).to_dict()["videos"][0]["tokens"] == [108, 22]
    earlytom_compile.restore(model)
    assert (model.forward, model.generate) == own


@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_with_all_tokens_it_answers_as_ever(model, variant):
    (clip,), tokens = clips(12), prompt(12)
    own = model.generate(tokens, clip[None], new=6)
    earlytom_compile.compile(model, lowering="eager", retain_ratio=1.0, variant=variant, strict=True)
    assert torch.equal(model.generate(tokens, clip[None], new=6), own)
    assert report(model).state == "compressing"


def test_videos_of_different_lengths_in_rows_of_their_own_and_in_one(model):
    first, second, third = clips(12, 7, 9)
    rows = [prompt(12, 9, before=4), prompt(7)]
    alone = [oracle_embeddings(model, rows[0], first, third), oracle_embeddings(model, rows[1], second)]
    plain = [model.generate(row, embeddings=e, new=5)[:, row.shape[1] :] for row, e in zip(rows, alone, strict=True)]
    width = max(row.shape[1] for row in rows)
    tokens = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows])
    earlytom_compile.compile(model, lowering="eager", **OPTIONS)
    new = model.generate(tokens, video=[first, third, second], mask=mask, new=5)[:, width:]
    assert torch.equal(new, torch.cat(plain))


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
def test_every_variant_gives_the_rows_of_the_oracle(model, variant):
    (clip,) = clips(12)
    earlytom_compile.compile(model, lowering="eager", **{**OPTIONS, "variant": variant})
    (rows,) = earlytom_compile.encode_videos(model, clip[None])
    torch.testing.assert_close(rows, oracle_rows(model, clip, variant), atol=1e-5, rtol=1e-5)


REUSE = {
    "plus": {"variant": "plus", "reuse": None, "merge_layers": None},
    "paper": {"variant": "paper", "reuse": True},
    "released": {"variant": "released", "reuse": True},
}


@pytest.mark.parametrize("variant, more", diagonal(REUSE, [{}, {"encode_ratio": 0.5}, {"full_layers": (1,)}]))
def test_patches_are_reused_in_it_too(model, variant, more):
    camera = {"patch": PATCH, "changing": 0.3, "generator": torch.Generator().manual_seed(0)}
    clip = standing_camera(6, SIDE, **camera)
    options = {**REUSE[variant], **more}
    earlytom_compile.compile(model, lowering="eager", strict=True, **{**OPTIONS, **options})
    (rows,) = earlytom_compile.encode_videos(model, clip[None])
    expected = oracle_rows(model, clip, **{**options, "merge_layers": (0, 2)})
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    (told,) = report(model).to_dict()["videos"]
    computed = sum(told["patches"]["by_frame"])
    assert computed == 108 if "encode_ratio" in more else 36 < computed < 216


def test_a_call_without_a_video_runs_its_own_code(model):
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        logits = model(tokens)
        earlytom_compile.compile(model, **OPTIONS)
        assert torch.equal(model(tokens), logits)
    assert report(model).to_dict()["last_call"] == "no video"


def test_what_is_asked_before_encoding_has_the_names_of_the_model(model):
    earlytom_compile.compile(model, **OPTIONS)
    with pytest.raises(EarlyTomConfigError, match=r"video have shape \(1, 4, 3, 24, 20\).*takes \(3, 24, 24\)"):
        model.generate(prompt(4), video=torch.zeros(1, 4, 3, SIDE, 20))
    with pytest.raises(EarlyTomConfigError, match="video: a str"):
        model.generate(prompt(4), video="talk.mp4")
    with pytest.raises(EarlyTomConfigError, match="mask has shape"):
        model.generate(prompt(4), video=torch.zeros(1, 4, 3, SIDE, SIDE), mask=torch.ones(1, 3))
    with pytest.warns(EarlyTomFallbackWarning, match="the prompt is not given as tokens"), torch.no_grad():
        model(video=torch.zeros(1, 4, 3, SIDE, SIDE), embeddings=torch.zeros(1, 3, 32))


def test_encode_and_observe(model):
    (clip,), tokens = clips(12), prompt(12)
    (observation,) = observe(model, clip[None], **OPTIONS)
    earlytom_compile.compile(model, lowering="eager", **OPTIONS)
    (rows,) = earlytom_compile.encode_videos(model, clip[None])
    torch.testing.assert_close(rows, oracle_rows(model, clip), atol=1e-5, rtol=1e-5)
    assert observation.tokens == (108, len(rows))
    answer = model.generate(tokens, video=clip[None], new=4)
    assert torch.equal(model.generate(tokens, video=[rows], new=4), answer)


def test_a_model_whose_loop_calls_forward_compresses_there(model, monkeypatch):
    """``generate`` is left alone where the family says that it only calls ``forward``."""
    monkeypatch.setattr(HandWritten, "generation", "forward")

    class Loop(VideoModel):
        @torch.no_grad()
        def generate(self, tokens, video, new=8):
            for _ in range(new):
                tokens = torch.cat((tokens, self(tokens, video=video)[:, -1:].argmax(-1)), 1)
            return tokens

    (clip,), tokens = clips(12), prompt(12)
    plain = model.generate(tokens, embeddings=oracle_embeddings(model, tokens, clip), new=3)
    looping = Loop().eval()
    looping.load_state_dict(model.state_dict())
    earlytom_compile.compile(looping, lowering="eager", **OPTIONS)
    assert torch.equal(looping.generate(tokens, clip[None], new=3), plain)


def test_rows_may_come_beside_the_ids(model, monkeypatch):
    """As several layers of features would, which are no embeddings."""

    class Beside(VideoModel):
        def forward(self, tokens=None, video=None, embeddings=None, mask=None, rows=None):
            return super().forward(tokens, video, self.placed(tokens, embeddings, rows), mask)

        def generate(self, tokens, video=None, embeddings=None, mask=None, new=8, rows=None):
            return super().generate(tokens, video, self.placed(tokens, embeddings, rows), mask, new)

        def placed(self, tokens, embeddings, rows):
            if rows is None:
                return embeddings
            return self.words(tokens).masked_scatter((tokens == VIDEO).unsqueeze(-1), rows)

    monkeypatch.setattr(HandWritten, "inputs", lambda family, model, ids, rows: {"input_ids": ids, "rows": rows[0][1]})
    (clip,), tokens = clips(12), prompt(12)
    embeddings = oracle_embeddings(model, tokens, clip)
    beside = Beside().eval()
    beside.load_state_dict(model.state_dict())
    earlytom_compile.compile(beside, lowering="eager", **OPTIONS)
    assert torch.equal(beside.generate(tokens, clip[None], new=6), model.generate(tokens, embeddings=embeddings, new=6))
    with torch.no_grad():
        torch.testing.assert_close(beside(tokens, clip[None]), model(embeddings=embeddings), atol=1e-5, rtol=1e-5)


def test_a_model_that_takes_no_embeddings_is_refused(model):
    class Closed(VideoModel):
        def forward(self, tokens, video=None):
            return super().forward(tokens, video)

    with pytest.raises(EarlyTomConfigError, match=r"Closed.forward\(\) takes no embeddings"):
        earlytom_compile.compile(Closed())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"names": {**HandWritten.names, "pixel_values_videos": "vidoe"}}, r"forward\(\) takes no vidoe.*it takes emb"),
        ({"names": {**HandWritten.names, "input_ids": "token"}}, r"takes no token\. .* must say in `names`"),
        ({"names": {**HandWritten.names, "attention_mask": "masks"}}, r"takes no masks"),
        (
            {"names": {**HandWritten.names, "input_id": "tokens"}},
            r"has 'input_id' in `names`; its keys can be input_ids",
        ),
        ({"generation": "loop"}, r"generation='loop'; it can be 'transformers', 'embeddings', 'forward' or None"),
        ({"rows": Family.rows}, r"hand-written model does not define rows\(model, pixels\)"),
        ({"prompt_method": "forward"}, r"has prompt_method, and does not define prompt\(\)"),
        ({"separators": lambda *_: None}, r"has separators, and does not define separator\(\)"),
        ({"embedding": Family.embedding}, r"embedding\(\) of the family the hand.* fails for VideoModel: AttributeErr"),
        ({"video_token": Family.video_token}, r"video_token\(\) of the family .* no attribute 'config'"),
        ({"video_token": lambda family, model: None}, r"video_token\(\) .* returned a NoneType; must be a number"),
        ({"embedding": lambda family, model: 3}, r"embedding\(\) .* returned a int; must be a module"),
    ],
)
def test_a_family_that_does_not_fit_its_model_is_refused(model, monkeypatch, said, reason):
    for name, value in said.items():
        monkeypatch.setattr(HandWritten, name, value)
    with pytest.raises(EarlyTomConfigError, match=reason):
        earlytom_compile.compile(model)
    with pytest.raises(EarlyTomConfigError, match=reason):
        observe(model, clips(4)[0][None])
    assert report(model).state == "never compiled"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("rows", "given"),
    [
        (lambda family, model, pixels: (model.see(pixels),), "a tuple"),
        (lambda family, model, pixels: None, "a NoneType"),
        (lambda family, model, pixels: model.pool(model.encode(pixels[0])), r"\[4, 9, 32\]"),
    ],
)
def test_rows_that_are_none_are_named(model, monkeypatch, rows, given, strict):
    monkeypatch.setattr(HandWritten, "rows", rows)
    earlytom_compile.compile(model, lowering="eager", strict=strict, **OPTIONS)
    with warnings.catch_warnings(), pytest.raises(EarlyTomConfigError) as caught:
        warnings.simplefilter("ignore", EarlyTomFallbackWarning)
        model.generate(prompt(4), video=clips(4)[0][None])
    assert re.search(rf"^rows\(\) of the family the hand-written model returned {given}; must be", str(caught.value))


def test_an_error_in_rows_keeps_its_type_and_says_whose_it_is(model, monkeypatch):
    monkeypatch.setattr(HandWritten, "rows", lambda family, model, pixels: model.nothing_of_this_name)
    earlytom_compile.compile(model, lowering="eager", **OPTIONS)
    with pytest.raises(AttributeError, match="nothing_of_this_name") as caught:
        model.generate(prompt(4), video=clips(4)[0][None])
    assert caught.value.__notes__ == ["in rows() of the family the hand-written model, compiled by earlytom_compile"]


def test_a_count_that_does_not_fit_names_the_family(model, monkeypatch):
    monkeypatch.setattr(HandWritten, "video_token", lambda family, model: 3)
    earlytom_compile.compile(model, lowering="eager", **OPTIONS)
    with pytest.raises(EarlyTomConfigError, match=r"need 36 .*rows\(\) or video_token\(\) of the family the hand-wr"):
        model.generate(prompt(4), video=clips(4)[0][None])


def test_rows_that_would_need_padding_need_a_mask(model):
    class Maskless(VideoModel):
        def forward(self, tokens=None, video=None, embeddings=None):
            return super().forward(tokens, video, embeddings)

    maskless = earlytom_compile.compile(Maskless().eval(), lowering="eager", **OPTIONS)
    (clip,) = clips(12)
    tokens = torch.cat((prompt(12), torch.full_like(prompt(12), 5)))
    with torch.no_grad():
        with pytest.warns(EarlyTomFallbackWarning, match="takes no attention mask. Give each row in a call of its own"):
            assert maskless(tokens, video=clip[None]).shape[:2] == tokens.shape
        assert maskless(prompt(12), video=clip[None]).shape[1] == prompt(12).shape[1] - 108 + 22


def test_layers_that_are_not_there_are_named_at_the_first_call_where_no_config_tells(model):
    earlytom_compile.compile(model, lowering="eager", variant="paper", merge_layers=(9,))
    with pytest.raises(EarlyTomConfigError, match="layer 9 does not exist"):
        model.generate(prompt(4), video=clips(4)[0][None])


def test_a_family_is_found_by_its_entry_point(model):
    assert isinstance(family_of(model), HandWritten)
    *built_in, mine = all_families()
    assert built_in == list(BUILT_IN) and mine.name == "the hand-written model"
    assert report(model).state == "never compiled"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module_at_all:Mine", "ModuleNotFoundError"),
        ("handwritten:NoSuchFamily", "AttributeError"),
        ("handwritten:VideoModel", "no subclass of"),
        ("earlytom_compile.families.base:Family", "does not say its name and classes"),
        ("handwritten:HandWritten()", "'handwritten:HandWritten\\(\\)' is no entry point"),
        ("hand written", "is no entry point: must be 'package.module:Class'"),
        ("exits_at_import:Mine", "SystemExit: 3"),
        ("claims_by_text:Mine", "classes='a.B' of claims_by_text:Mine: must be a tuple of str"),
    ],
)
def test_a_broken_family_is_named_with_its_package_and_stands_in_nobodys_way(tmp_path, monkeypatch, value, reason):
    install(tmp_path, monkeypatch, value)
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(3)\n")
    by_text = "from handwritten import HandWritten\nclass Mine(HandWritten):\n    classes = 'a.B'\n"
    (tmp_path / "claims_by_text.py").write_text(by_text)
    with pytest.warns(EarlyTomFallbackWarning, match=f"'mine' of the package 'video-models-of-mine'.*{reason}"):
        assert all_families() == list(BUILT_IN)
    with pytest.warns(EarlyTomFallbackWarning), pytest.raises(EarlyTomConfigError, match="got VideoModel"):
        earlytom_compile.compile(VideoModel())
