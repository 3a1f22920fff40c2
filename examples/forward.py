"""The plain PyTorch spelling, for forward(): the backend is named by a string and never imported.

    python examples/forward.py path/to/checkpoint video.mp4

Prints the five likeliest first tokens of the answer, with a tenth of the video tokens and with all of them.
"""

import argparse

import torch
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.integrations.preprocess import conversation, frame_resizer, frames_of, load_processor
from earlytom_compile.integrations.video import read_video


def main(checkpoint: str, video: str, question: str) -> None:
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint).eval()
    fast = torch.compile(model, backend="earlytom", options={"retain_ratio": 0.1})

    processor = load_processor(checkpoint)
    prompt = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
    frames = read_video(video, default=frames_of(checkpoint), resize=frame_resizer(processor)).pixels
    inputs = processor(text=prompt, videos=frames, return_tensors="pt").to(model.device, model.dtype)

    with torch.no_grad():
        for name, call in {"all tokens": model, "compressed": fast}.items():
            logits = call(**inputs).logits
            best = logits[0, -1].topk(5).indices.tolist()
            print(f"{name:12} {logits.shape[1]:5} positions, next: {[processor.decode([i]) for i in best]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("video", help="any that FFmpeg reads; as many frames are taken as the checkpoint says, else 32")
    parser.add_argument("question", nargs="?", default="What happens in the video?", help="(%(default)s)")
    main(**vars(parser.parse_args()))
