"""Answer a question about a video with a tenth of its tokens: one line more than without.

    python examples/generate.py path/to/checkpoint video.mp4 "What happens in the video?"

Any LLaVA-OneVision checkpoint will do; ``earlytom demo --save tiny`` leaves a small one in ``tiny/checkpoint`` and a
video in ``tiny/clip.mp4``.
"""

import argparse

from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile.integrations.preprocess import conversation, frame_resizer, frames_of, load_processor
from earlytom_compile.integrations.video import read_video


def main(checkpoint: str, video: str, question: str) -> None:
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint).eval()
    earlytom_compile.compile(model, retain_ratio=0.1)  # the one line

    # transformers' own processor, or a stand-in with the same calls where torchvision is missing
    processor = load_processor(checkpoint)
    prompt = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
    frames = read_video(video, default=frames_of(checkpoint), resize=frame_resizer(processor)).pixels
    inputs = processor(text=prompt, videos=frames, return_tensors="pt").to(model.device, model.dtype)

    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    # generate returns the whole prompt and then the answer, as without compression
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(earlytom_compile.report(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("video", help="any that FFmpeg reads; as many frames are taken as the checkpoint says, else 32")
    parser.add_argument("question", nargs="?", default="What happens in the video?", help="(%(default)s)")
    main(**vars(parser.parse_args()))
