"""One compressed forward against the same model through plain Inductor, interleaved in one run.

    python benchmarks/forward.py --retain-ratio 0.1 --json forward.json

The model has random weights (its shapes decide the time, not its values); MLP widths and vocabulary are the
defaults of transformers' configuration classes. The table says how far the frames of the synthetic video merge.
Both arms run the whole prefill, logits of every position included, under ``torch.inference_mode()``.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache

import earlytom_compile


def build(arguments: argparse.Namespace) -> torch.nn.Module:
    """A LLaVA-OneVision of transformers with random weights in the given shape."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=arguments.vision_hidden,
        intermediate_size=arguments.vision_mlp,
        num_hidden_layers=arguments.vision_layers,
        num_attention_heads=arguments.vision_hidden // 64,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        vision_use_head=False,
    )
    text = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=arguments.text_hidden,
        intermediate_size=arguments.text_mlp,
        num_hidden_layers=arguments.text_layers,
        num_attention_heads=arguments.text_hidden // 64,
        num_key_value_heads=max(1, arguments.text_hidden // 256),
        max_position_embeddings=32768,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        image_token_index=1,
        video_token_index=2,
    )
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    return model.to(arguments.device, getattr(torch, arguments.dtype)).requires_grad_(False)


def make_inputs(model: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """One prompt with one video of scenes of 8 frames, each frame with noise of its own."""
    size, frames = arguments.image_size, arguments.frames
    scenes = torch.randn((frames + 7) // 8, 3, size, size).repeat_interleave(8, 0)[:frames]
    pixels = scenes + arguments.noise * torch.randn(frames, 3, size, size)
    side = -(-(size // arguments.patch_size) // 2)
    video = [model.config.video_token_id] * (frames * side * side + 1)
    ids = torch.tensor([[5, 6, 7, *video, *range(8, 40)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels[None]}
    moved = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
    moved["pixel_values_videos"] = moved["pixel_values_videos"].to(model.dtype)
    return moved


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Compile both arms, time them in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"vision_layers": 12, "vision_hidden": 384, "text_layers": 8, "text_hidden": 512, "frames": 16}
    widths = {"vision_mlp": transformers.SiglipVisionConfig().intermediate_size}
    widths["text_mlp"] = transformers.Qwen2Config().intermediate_size
    pixels = {"image_size": 384, "patch_size": 14}  # 729 encoder tokens a frame, 196 after pooling
    for name, default in {**shape, **widths, **pixels, "repeats": 5}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.1, help="of each frame; 0 = scenes stand still")
    parser.add_argument("--retain-ratio", type=float, default=0.1)
    parser.add_argument("--lowering", nargs="+", default=[earlytom_compile.EarlyTomConfig.lowering])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = build(arguments)
    inputs = make_inputs(model, arguments)
    compiled = {"inductor": torch.compile(model, dynamic=False)}
    for lowering in arguments.lowering:
        options = {"retain_ratio": arguments.retain_ratio, "lowering": lowering}
        compiled[f"earlytom {lowering}"] = torch.compile(model, backend="earlytom", options=options, dynamic=False)
    arms = {name: lambda fast=fast: fast(**inputs) for name, fast in compiled.items()}
    compile_seconds = {}
    for name, call in arms.items():
        with fresh_cache():  # the first call of each arm compiles everything it needs
            compile_seconds[name] = timed(call, arguments.device)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.repeats):
        for name, call in arms.items():
            seconds[name].append(timed(call, arguments.device))

    content = earlytom_compile.report(model).to_dict()
    (video,) = content["videos"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    frames, tokens = " -> ".join(map(str, video["frames"])), " -> ".join(map(str, video["tokens"]))
    table = Table(title=f"frames {frames}, video tokens {tokens}")
    for column in ("arm", "cold call s", "median ms", "min ms", "max ms", "speed"):
        table.add_column(column, justify="right" if column != "arm" else "left")
    for name, values in seconds.items():
        numbers = (compile_seconds[name], *(1e3 * x for x in (medians[name], min(values), max(values))))
        speed = medians["inductor"] / medians[name]
        table.add_row(name, *(f"{number:.1f}" for number in numbers), f"{speed:.2f}x")
    Console().print(table)
    if arguments.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        chosen = {name: str(value) for name, value in vars(arguments).items()}
        result = {
            "speed": {name: medians["inductor"] / median for name, median in medians.items()},
            "seconds": seconds,
            "report": content,
            **versions,
            **machine,
            "arguments": chosen,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
