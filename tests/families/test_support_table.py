"""What the README's table of families says that no test of a single family does: adapters, quantised weights, fewer
tokens inside the language model, torch.compile and CUDA graphs, of each family against its oracle.

LLaVA's own code is here as it is written by hand.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from generating import NEW, new_tokens
from handwritten_llava import handwritten_llava
from llava_calls import Call, clip, expected, generated
from oracle import compressed_forward, compressed_generate, compressed_videos
from oracle_llava import compressed_steps, compressed_video
from oracle_qwen import compressed_generate as compressed_qwen_generate
from oracle_qwen import compressed_sequences
from oracle_qwen import compressed_videos as compressed_qwen_videos
from oracle_qwen_inner import InnerStep, generated_with_fewer
from qwen_calls import takes_features
from test_cuda_graphs import FakeGraphs, fake_graphs
from tiny_models import tiny_llava_next_video, tiny_llava_onevision, tiny_video_llava, video_inputs
from tiny_qwen import Clip as QwenClip
from tiny_qwen import qwen_inputs, tiny_qwen
from torch import nn
from torch.torch_version import TorchVersion

import earlytom_compile
from earlytom_compile import EarlyTomFallbackWarning, report
from earlytom_compile.families.llava import Llava
from earlytom_compile.methods.base import Step

OPTIONS: dict[str, Any] = {
    "variant": "paper",
    "merge_layers": (0, 1),
    "reuse": False,
    "tau_seg": 0.3,
    "retain_ratio": 0.3,
}
SPECIFIED = {"variant": "paper", **OPTIONS}
ADAPTED = (
    r".*(vision_tower|video_tower).*\.(q_proj|v_proj|fc1|mlp\.0)"
    r"|.*(multi_modal_projector\.linear_\d|mm_projector\.[02])"
)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class OfTransformers:
    """A family whose prompts have a placeholder for each row."""

    adapted = ADAPTED
    replayed = "_tower", "rotary_emb"
    """Words of the names of what CUDA graphs replay: in the encoder, in the language model."""

    def __init__(self, make, not_in_a_graph=None, not_inside=None):
        """``not_in_a_graph``: why ``torch.compile(model, backend="earlytom")`` runs uncompressed, if it does;
        ``not_inside``: why no tokens go inside the language model."""
        self.make, self.not_in_a_graph, self.not_inside = make, not_in_a_graph, not_inside

    def rows(self, model):
        (rows,) = earlytom_compile.encode_videos(model, video_inputs(model, 8)["pixel_values_videos"])
        return rows

    def expected_rows(self, model):
        return compressed_videos(model, video_inputs(model, 8), **SPECIFIED)[0].features

    def tokens(self, model):
        return new_tokens(model, video_inputs(model, 8))

    def expected_tokens(self, model, steps=()):
        return compressed_generate(model, video_inputs(model, 8), NEW, steps=steps, **SPECIFIED)

    def call(self, model):
        return video_inputs(model, 8, videos_per_row=(2, 1))


class OfLlava(OfTransformers):
    """LLaVA's own code, which puts rows into its prompts itself."""

    def rows(self, model):
        (rows,) = earlytom_compile.encode_videos(model, [clip(model, 8)])
        return rows

    def expected_rows(self, model):
        return compressed_video(model, clip(model, 8), **SPECIFIED).rows

    def tokens(self, model):
        return generated(model, self._call(model), NEW)

    def expected_tokens(self, model, steps=()):
        return compressed_steps(model, expected(model, self._call(model), **SPECIFIED), NEW, steps)[0]

    def call(self, model):
        return self._call(model).forward()

    def _call(self, model):
        return Call.of(model, [["text", "video", "text"]], frames=8)


class OfQwen(OfTransformers):
    """Packed frames of any size, whose tower has no names of the others'."""

    adapted = r".*visual\.(.*\.)?(qkv|proj|\w+_proj|linear_fc\d|mlp\.[02])"
    replayed = "visual.", "rotary_emb"

    def rows(self, model):
        inputs = self._inputs(model)
        about = {"video_grid_thw": inputs["video_grid_thw"]}
        (rows,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"], **about)
        return rows

    def expected_rows(self, model):
        (video,) = compressed_qwen_videos(model, self._inputs(model), **SPECIFIED)
        return torch.cat([video.features, *video.deepstack], dim=1)

    def tokens(self, model):
        return new_tokens(model, self._inputs(model))

    def expected_tokens(self, model, steps=()):
        if not steps:
            return compressed_qwen_generate(model, self._inputs(model), NEW, **SPECIFIED)
        (step,) = (InnerStep(step.layer, 1 - step.keep_ratio) for step in steps)
        ((row, video_of),) = compressed_sequences(model, self._inputs(model), **SPECIFIED)
        return torch.tensor([generated_with_fewer(model, row, video_of, step, NEW)])

    def call(self, model):
        return self._inputs(model)

    def _inputs(self, model):
        return qwen_inputs(model, [[3, QwenClip(8, 4, 6), 4]])


def of_qwen(kind, **reasons):
    def make(text_layers=None, seed=0):  # what tiny_qwen makes has two layers or three
        return tiny_qwen(kind, vision_layers=3, full=(0, 2), deepstack=(0, 1), seed=seed)

    return OfQwen(make, "stand in one sequence", **reasons)


FAMILIES = {
    "LLaVA-OneVision": OfTransformers(lambda **options: tiny_llava_onevision(vision_layers=4, **options)),
    "LLaVA-NeXT-Video": OfTransformers(tiny_llava_next_video, "video features flow into getitem"),
    "Video-LLaVA": OfTransformers(tiny_video_llava),
    "LLaVA": OfLlava(
        lambda **options: handwritten_llava(newline="grid", pool="average", **options),
        "running without compression",  # its newlines come first, then the end of the graph
    ),
    "Qwen2.5-VL": of_qwen("qwen2_5_vl"),
    "Qwen3-VL": of_qwen("qwen3_vl"),
    "Qwen3.5": of_qwen("qwen3_5", not_inside="some of its layers have linear attention"),
}
MARKS = {
    "LLaVA-NeXT-Video": [
        pytest.mark.skipif(
            TorchVersion(transformers.__version__) < "5.21", reason="LLaVA-NeXT-Video needs transformers 5.21"
        )
    ],
    "Qwen3-VL": [takes_features],
}
"""LLaVA-OneVision needs none of it: tests/in_place and tests/test_backend.py are about it."""


@pytest.fixture
def family(request, monkeypatch):
    monkeypatch.setattr(Llava, "requires", {})  # an old transformers, which what is written by hand does not need
    return FAMILIES[request.param]


def of_each_family(*quick):
    """The quick suite runs those that ``quick`` names, of each kind of tower and of prompt; the long one runs all."""
    marks = {name: MARKS.get(name, []) + [pytest.mark.long] * (name not in quick) for name in FAMILIES}
    every = [pytest.param(name, marks=marks[name]) for name in FAMILIES]
    return pytest.mark.parametrize("family", every, indirect=True)


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", "strict": True, **OPTIONS, **options})


def check(family, model, reference):
    """The compressed video of ``model`` and the answer are those of ``reference``, and not what they would be without
    what was done to it."""
    wanted, tokens = family.expected_rows(reference), family.expected_tokens(reference)
    plain = family.expected_rows(family.make())
    got = family.rows(compiled(model))
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert plain.shape != got.shape or (plain - got).abs().max() > 1e-3
    assert report(model).to_dict()["videos"][0]["frames"][-1] < 8, "nothing merged, the test would compare too little"
    assert torch.equal(family.tokens(model), tokens)


@of_each_family("Qwen2.5-VL")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora(family):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=family.adapted, r=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(family.make(), config).eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    check(family, wrapped.get_base_model(), merged)


@of_each_family("LLaVA-NeXT-Video", "LLaVA", "Qwen3.5")
def test_quantised(family):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    model = family.make()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda each, name: isinstance(each, nn.Linear))
    check(family, model, model)


@of_each_family("Qwen2.5-VL", "Qwen3.5")
def test_inner_merging(family):
    model = family.make(text_layers=3, seed=3)
    everything = family.tokens(compiled(model))
    if family.not_inside is not None:
        with pytest.warns(
            EarlyTomFallbackWarning, match=f"no tokens go inside the language model: {family.not_inside}"
        ):
            assert torch.equal(family.tokens(compiled(model, inner_layer=1, strict=False)), everything)
        assert report(model).to_dict()["inside"] == []
        return
    wanted = family.expected_tokens(earlytom_compile.restore(model), [Step(1, 0.5, "mean")])
    assert torch.equal(family.tokens(compiled(model, inner_layer=1)), wanted)
    assert not torch.equal(everything, wanted), "half of the tokens do the same, which shows nothing"
    (step,) = report(model).to_dict()["inside"]
    assert step["layer"] == 1


@of_each_family("LLaVA-NeXT-Video", "LLaVA")
def test_torch_compile(family):
    """``forward()`` in one graph, where its code lets a graph be understood, and uncompressed with a reason else."""
    model = family.make()
    call = family.call(model)
    fast = torch.compile(model, backend="earlytom", options={"lowering": "eager", **OPTIONS})
    with torch.no_grad():
        if family.not_in_a_graph is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EarlyTomFallbackWarning)  # of pieces behind a graph that breaks
                with pytest.warns(EarlyTomFallbackWarning, match=family.not_in_a_graph):
                    logits = fast(**call).logits
            torch.testing.assert_close(logits, model(**call).logits, atol=1e-4, rtol=1e-4)
            return
        wanted = compressed_forward(model, call, **SPECIFIED)
        logits = fast(**call).logits
    seen = wanted.cut_attention_mask.bool()
    assert logits.shape == wanted.logits.shape
    torch.testing.assert_close(logits[seen], wanted.logits[seen], atol=1e-4, rtol=1e-4)


@of_each_family("LLaVA", "Qwen3-VL")
def test_cuda_graphs(family):
    """Of a device that is made up: layers of the encoder and the pass over the prompt are replayed, and answers stay
    what they are."""
    model = family.make(text_layers=2)
    wanted = family.expected_tokens(model)
    with fake_graphs(FakeGraphs()):
        earlytom_compile.compile(model, mode="reduce-overhead", strict=True, **OPTIONS)
        answers = [family.tokens(model) for _ in range(3)]
        parts = " ".join(graph["part"] for graph in report(model).to_dict()["cuda_graphs"] if graph["used"])
        earlytom_compile.restore(model)
    assert all(torch.equal(answer, wanted) for answer in answers)
    assert all(word in parts for word in family.replayed), parts
