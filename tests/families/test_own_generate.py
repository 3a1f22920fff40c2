"""``generate()`` of other habits than transformers': what it is given, and what becomes of what it returns."""

import pytest
import torch
from handwritten import HandWritten, VideoModel
from test_outside import OPTIONS, clips, prompt
from transformers import GenerationMixin

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomFallbackWarning, report
from earlytom_compile.families import registry
from earlytom_compile.integrations.checks import generation_of

NEW = 5
TOKENS = prompt(12)
PLAIN = VideoModel.generate


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(registry, "_of_other_packages", lambda: [HandWritten()])


@pytest.fixture(scope="module")
def clip():
    return clips(12)[0]


@pytest.fixture(scope="module")
def compressed(clip):
    """(the rows [K, C] of the video, the tokens that follow them): traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_of_other_packages", lambda: [HandWritten()])
        model = earlytom_compile.compile(VideoModel().eval(), lowering="eager", **OPTIONS)
        (rows,) = earlytom_compile.encode_videos(model, clip[None])
        return rows, model.generate(TOKENS, video=[rows], new=NEW)[:, TOKENS.shape[1] :]


def made(kind, **options):
    return earlytom_compile.compile(kind().eval(), lowering="eager", **{**OPTIONS, "strict": True, **options})


class NewOnly(VideoModel):
    def generate(self, tokens, video=None, embeddings=None, mask=None, new=NEW):
        return PLAIN(self, tokens, video, embeddings, mask, new)[:, tokens.shape[1] :]


class Words(NewOnly):
    def generate(self, tokens, video=None, embeddings=None, mask=None):
        return [" ".join(map(str, row)) for row in super().generate(tokens, video, embeddings, mask).tolist()]


class Beside(NewOnly):
    def generate(self, tokens, video=None, embeddings=None, mask=None):
        return super().generate(tokens, video, embeddings, mask), "more"


class First(NewOnly):
    def generate(self, tokens, video=None, embeddings=None, mask=None):
        return super().generate(tokens, video, embeddings, mask)[0]


class Stream(NewOnly):
    def generate(self, tokens, video=None, embeddings=None, mask=None):
        yield from super().generate(tokens, video, embeddings, mask)[0].tolist()


@pytest.mark.parametrize(
    "kind, as_tokens",
    [
        (NewOnly, lambda output: output),
        (Words, lambda output: torch.tensor([[int(word) for word in output[0].split()]])),
        (Beside, lambda output: output[0]),
        (First, lambda output: output[None]),
        (Stream, lambda output: torch.tensor([list(output)])),
    ],
)
def test_what_has_no_prompt_in_front_is_handed_through(kind, as_tokens, compressed):
    rows, expected = compressed
    assert torch.equal(as_tokens(made(kind).generate(TOKENS, video=[rows])), expected)


def test_ids_go_by_their_name_or_else_first(compressed):
    rows, expected = compressed

    class ByName(VideoModel):
        def generate(self, *, tokens, video=None, embeddings=None, mask=None):
            return PLAIN(self, tokens, video, embeddings, mask, NEW)

    class VideoFirst(VideoModel):
        def generate(self, video=None, tokens=None, embeddings=None, mask=None):
            return PLAIN(self, tokens, video, embeddings, mask, NEW)

    class Inputs(VideoModel):
        def generate(self, inputs, video=None, embeddings=None, mask=None):
            return PLAIN(self, inputs, video, embeddings, mask, NEW)

    class HandsOn(VideoModel):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs, new=NEW)

    length = TOKENS.shape[1]
    assert torch.equal(made(ByName).generate(tokens=TOKENS, video=[rows])[:, length:], expected)
    assert torch.equal(made(VideoFirst).generate([rows], TOKENS)[:, length:], expected)
    assert torch.equal(made(Inputs).generate(TOKENS, [rows])[:, length:], expected)
    assert torch.equal(made(HandsOn).generate(TOKENS, [rows])[:, length:], expected)
    with pytest.raises(TypeError, match="at most 0 positional"):
        made(ByName).generate(TOKENS, video=[rows])


def test_limits_and_streamers_are_its_own(compressed):
    rows, expected = compressed

    class Own(VideoModel):
        def generate(self, tokens, video=None, embeddings=None, mask=None, max_length=3, streamer=None):
            output = PLAIN(self, tokens, video, embeddings, mask, max_length)
            streamer.extend(output[0, -max_length:].tolist())
            return output

    seen = []
    output = made(Own).generate(TOKENS, video=[rows], max_length=NEW, streamer=seen)
    assert torch.equal(output[:, TOKENS.shape[1] :], expected)
    assert seen == expected[0].tolist()


class Cached(VideoModel):
    """A loop whose mask grows, as one with a cache has it: of no use to a prompt that was cut inside forward()."""

    @torch.no_grad()
    def generate(self, tokens, video=None, new=NEW, **more):
        mask = torch.ones_like(tokens)
        for _ in range(new):
            following = self(tokens, video=video, mask=mask)[:, -1:].argmax(-1)
            tokens, mask = torch.cat((tokens, following), 1), torch.cat((mask, torch.ones_like(following)), 1)
        return tokens


class CachedStream(Cached):
    def generate(self, tokens, video=None):
        yield from super().generate(tokens, video)[0]


class Asks(Cached):
    """Has no video among its arguments."""

    def generate(self, question, clips):
        return super().generate(question, clips)


@pytest.mark.parametrize("kind", [Cached, CachedStream, Asks])
def test_one_without_embeddings_runs_uncompressed_and_says_so(kind, clip):
    own = list(kind().generate(TOKENS, clip[None]))
    with pytest.warns(EarlyTomFallbackWarning, match=rf"{kind.__name__}.generate\(\) names no argument embeddings"):
        got = list(made(kind, strict=False).generate(TOKENS, clip[None]))
    assert all(map(torch.equal, got, own))
    model = made(kind)
    with pytest.raises(EarlyTomCompileError, match="say in the family .* by `generation`"):
        list(model.generate(TOKENS, clip[None]))
    assert report(model).state == "called, nothing compressed so far"


def test_a_video_by_path_is_left_to_one_without_embeddings(clip):
    class Reads(Cached):
        def generate(self, tokens, video=None):
            assert video == "talk.mp4"
            return super().generate(tokens, clip[None], new=1)

    with pytest.warns(EarlyTomFallbackWarning, match="names no argument embeddings"):
        made(Reads, strict=False).generate(TOKENS, "talk.mp4")


def test_which_generate_is_whose(monkeypatch):
    class Mixed(VideoModel, GenerationMixin):
        generate = GenerationMixin.generate

    class HandsOn(Mixed):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    class None_(torch.nn.Module):
        pass

    kinds = {VideoModel: "embeddings", Cached: None, Mixed: "transformers", HandsOn: "transformers", None_: "forward"}
    family = HandWritten()
    assert {kind: generation_of(kind.__new__(kind), family) for kind in kinds} == kinds
    monkeypatch.setattr(HandWritten, "generation", "forward")
    assert generation_of(VideoModel(), family) == "forward"
