"""Qwen2.5-VL and Qwen3-VL with random weights, asked by vLLM and, as the oracle, by transformers.

engine = Engine(folder, {"retain_ratio": 0.2})            # vLLM in this process
engine.ask([Question("what?", (film(16, seed=0),))])      # an Answer each: token ids, positions, embeddings
Oracle(folder, {"retain_ratio": 0.2}).ask(...)            # the same of earlytom_compile.compile()
"""

import gc
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_qwen_checkpoint import write_qwen_checkpoint
from torch import Tensor

from earlytom_compile.shapes import shape_of

NEW = 24
SHAPES = {"qwen2_5_vl": "cpu-tiny-qwen2.5", "qwen3_vl": "cpu-tiny-qwen3"}
"""Of four vision layers."""
OPTIONS = {"variant": "paper", "retain_ratio": 0.2, "merge_layers": [0, 2], "lowering": "eager"}
EVERYTHING = {"retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0}
"""No frame merges, no token goes."""


def checkpoint(folder: Path, kind: str) -> Path:
    """Written by transformers, by the names that published ones have."""
    heads = {"llm_width": 128, "llm_head": 32}  # vLLM's attention has kernels for few sizes
    folder = write_qwen_checkpoint(folder / kind, replace(shape_of(SHAPES[kind]), **heads), most_tokens=24)
    path = folder / "processor_config.json"
    processors = json.loads(path.read_text())
    for name in ("image_mean", "image_std"):  # vLLM normalises videos by those of images, which are the same in Qwen's
        processors["image_processor"][name] = processors["video_processor"][name]
    path.write_text(json.dumps(processors))
    return folder


def film(pictures: int, seed: int, height: int = 84, width: int = 112) -> np.ndarray:
    """uint8 [pictures, height, width, 3]: three still scenes with noise, which merge within and not between."""
    random = np.random.default_rng(seed)
    scenes = [random.integers(0, 255, (height, width, 3)) for _ in range(3)]
    noise = random.integers(-30, 30, (pictures, height, width, 3))
    return np.stack([scenes[3 * i // pictures] + noise[i] for i in range(pictures)]).clip(0, 255).astype(np.uint8)


def picture(seed: int) -> np.ndarray:
    """uint8 [112, 84, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (112, 84, 3)).astype(np.uint8)


@dataclass(frozen=True)
class Question:
    """``text`` with a V where a video stands and an I where an image does, both in capitals."""

    text: str
    videos: Sequence[np.ndarray] = ()
    images: Sequence[np.ndarray] = ()
    options: Any = None
    """Of this request alone, where vLLM is asked."""
    fps: float = 2.0
    encoded: Any = None
    """What vLLM takes in place of ``videos``."""

    @property
    def prompt(self) -> str:
        """As the chat template writes it."""
        marked = self.text.replace("V", "<|vision_start|><|video_pad|><|vision_end|>")
        marked = marked.replace("I", "<|vision_start|><|image_pad|><|vision_end|>")
        return f"<|im_start|>user\n{marked}<|im_end|>\n<|im_start|>assistant\n"

    def metadata(self, video: np.ndarray) -> dict[str, Any]:
        """No frame is left out."""
        count = len(video)
        return {
            "fps": self.fps,
            "duration": count / self.fps,
            "total_num_frames": count,
            "frames_indices": list(range(count)),
        }


@dataclass
class Answer:
    """What came, and what the language model got for it."""

    tokens: list[int]
    prompt: list[int] = field(default_factory=list)
    """Token ids of the prompt."""
    cached: int = 0
    """Of them, those whose keys and values were there."""
    positions: Tensor | None = None
    """int64 [3, S]: of the prompt and of what was generated but the last."""
    embeddings: Tensor | None = None
    """[S, C]."""


class Engine:
    """vLLM in this process, with chunks of ``chunk`` tokens."""

    def __init__(self, folder: Path, options: Any, *, chunk: int = 64, **arguments: Any) -> None:
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        from vllm import LLM

        if options is not None:
            arguments["mm_processor_kwargs"] = {"earlytom": options}
        self.llm = LLM(
            model=str(folder),
            dtype="float32",
            max_model_len=1024,
            max_num_batched_tokens=chunk,
            max_num_seqs=8,
            limit_mm_per_prompt={"video": 2, "image": 1},
            enable_mm_embeds=True,
            block_size=32,
            enforce_eager=True,
            disable_log_stats=True,
            **arguments,
        )
        self._calls: list[dict[str, Any]] = []
        inner = self.model.language_model.model  # whose hooks do not run
        self._forward, inner.forward = inner.forward, self._noting

    @property
    def model(self) -> Any:
        """That of the worker."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """All at once; positions and embeddings are told of a question alone."""
        from vllm import SamplingParams

        self._calls.clear()
        greedy = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
        outputs = self.llm.generate([self._request(each) for each in questions], greedy, use_tqdm=False)
        answers = [
            Answer(list(output.outputs[0].token_ids), list(output.prompt_token_ids), output.num_cached_tokens or 0)
            for output in outputs
        ]
        if len(answers) == 1:
            answers[0].positions = torch.cat([call["positions"] for call in self._calls], dim=1)
            answers[0].embeddings = torch.cat([call["inputs_embeds"] for call in self._calls])
        return answers

    def _request(self, question: Question) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if question.videos:
            data["video"] = [
                (video, {**question.metadata(video), "video_backend": "opencv", "do_sample_frames": False})
                for video in question.videos
            ]
        if question.encoded is not None:
            data["video"] = question.encoded
        if question.images:
            data["image"] = list(question.images)
        asked = {} if question.options is None else {"mm_processor_kwargs": {"earlytom": question.options}}
        return {"prompt": question.prompt, "multi_modal_data": data, **asked}

    def _noting(self, input_ids: Any, positions: Tensor, *args: Any, **arguments: Any) -> Any:
        embeddings = arguments["inputs_embeds"] if "inputs_embeds" in arguments else args[1]
        self._calls.append({"positions": positions.clone(), "inputs_embeds": embeddings.clone()})
        return self._forward(input_ids, positions, *args, **arguments)

    def forget(self) -> None:
        """Keys and values of prompts that came before."""
        assert self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Another can be started in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


class Oracle:
    """transformers, with videos compressed in place, or not where ``options`` is None."""

    def __init__(self, folder: Path, options: dict[str, Any] | None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import earlytom_compile

        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        if options is not None:
            earlytom_compile.compile(self._model, **{**options, "strict": True})
        self._processor = AutoProcessor.from_pretrained(folder)
        if hasattr(self._model.config.vision_config, "tokens_per_second"):
            _go_on_behind_time(self._model.model)
        self._calls: list[dict[str, Any]] = []
        self._model.model.language_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def ask(self, question: Question) -> Answer:
        """Checks that its choices are sharp: that no other token was nearly as likely."""
        from transformers.video_utils import VideoMetadata

        given: dict[str, Any] = {}
        if question.videos:
            metadata = [VideoMetadata(**question.metadata(video)) for video in question.videos]
            given = {"videos": list(question.videos), "video_metadata": metadata, "do_sample_frames": False}
        if question.images:
            given["images"] = list(question.images)
        inputs = self._processor(text=[question.prompt], return_tensors="pt", **given)
        self._calls.clear()
        with torch.no_grad():
            made = self._model.generate(
                **inputs,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                suppress_tokens=None,
                output_scores=True,
                return_dict_in_generate=True,
            )
        first, second = torch.cat(made.scores).topk(2).values.unbind(1)
        assert (first - second).min() > 1e-3
        length = inputs["input_ids"].shape[1]
        return Answer(
            made.sequences[0, length:].tolist(),
            positions=torch.cat([call["position_ids"][-3:, 0] for call in self._calls], dim=1),
            embeddings=torch.cat([call["inputs_embeds"][0] for call in self._calls]),
        )

    def _note(self, module: Any, args: Any, arguments: dict[str, Any]) -> None:
        self._calls.append({name: arguments[name].clone() for name in ("position_ids", "inputs_embeds")})


def _go_on_behind_time(model: Any) -> None:
    """Qwen's own code, transformers 4 and vLLM count on behind the last number that a video has on any axis;
    transformers 5 behind its rows and columns alone."""
    vision = model.config.vision_config

    def get_rope_index(
        input_ids: Tensor, mm_token_type_ids: Tensor, second_per_grid_ts: Any = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        grids = {kind: iter(given[name]) for kind, name in enumerate(("image_grid_thw", "video_grid_thw"), 1)
                 if given.get(name) is not None}  # fmt: skip
        seconds, parts, begin = iter(() if second_per_grid_ts is None else second_per_grid_ts), [], 0
        for kind, tokens in itertools.groupby(mm_token_type_ids[0].tolist()):
            if kind == 0:
                part = torch.arange(len(list(tokens))).expand(3, -1)
            else:
                frames, height, width = next(grids[kind]).tolist()
                sides = (frames, height // vision.spatial_merge_size, width // vision.spatial_merge_size)
                part = torch.cartesian_prod(*map(torch.arange, sides)).T.clone()
                if kind == 2:
                    part[0] = (part[0] * float(next(seconds)) * vision.tokens_per_second).long()
            parts.append(part + begin)
            begin = int(parts[-1].max()) + 1
        positions = torch.cat(parts, dim=1).unsqueeze(1)
        return positions, torch.tensor([[begin - input_ids.shape[1]]])

    model.get_rope_index = get_rope_index
