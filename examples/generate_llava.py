"""The same with a checkpoint of LLaVA's own code (package ``llava``): LLaVA-OneVision, LLaVA-Video.

python examples/generate_llava.py lmms-lab/llava-onevision-qwen2-0.5b-ov video.mp4 "What happens in the video?"
"""

import argparse

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

import earlytom_compile
from earlytom_compile.integrations.video import read_video


def main(checkpoint: str, video: str, question: str) -> None:
    tokenizer, model, image_processor, _ = load_pretrained_model(
        checkpoint, None, "llava_qwen", device_map="auto", torch_dtype="bfloat16", attn_implementation="sdpa"
    )
    earlytom_compile.compile(model.eval(), retain_ratio=0.1)  # the one line

    frames = image_processor.preprocess(list(read_video(video).pixels), return_tensors="pt")["pixel_values"]
    conversation = conv_templates["qwen_1_5"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    output = model.generate(
        ids[None].to(model.device),
        images=[frames.to(model.device, model.dtype)],
        modalities=["video"],
        max_new_tokens=32,
        do_sample=False,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))  # the new tokens, as without compression
    print(earlytom_compile.report(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("video", help="any that FFmpeg reads; 32 frames are taken of it")
    parser.add_argument("question", nargs="?", default="What happens in the video?", help="(%(default)s)")
    main(**vars(parser.parse_args()))
