"""A conversation about one video, which is encoded once.

    python examples/follow_up.py path/to/checkpoint video.mp4 "What happens in the video?" "And then?"

``earlytom demo --save tiny`` leaves a checkpoint in ``tiny/checkpoint`` and a video in ``tiny/clip.mp4``.
"""

import argparse

from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile.integrations.preprocess import conversation, frame_resizer, frames_of, load_processor
from earlytom_compile.integrations.video import read_video


def main(checkpoint: str, video: str, *questions: str) -> None:
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint).eval()
    earlytom_compile.compile(model, retain_ratio=0.1)

    processor = load_processor(checkpoint)
    talk = conversation(questions[0])  # the video, then the first question
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    frames = read_video(video, default=frames_of(checkpoint), resize=frame_resizer(processor)).pixels
    inputs = processor(text=prompt, videos=frames, return_tensors="pt").to(model.device, model.dtype)
    encoded = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])  # once

    for question in questions:
        if question is not questions[0]:
            talk.append({"role": "user", "content": [{"type": "text", "text": question}]})
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        # One <video> in the prompt is enough: the encoded video takes its place.
        ids = processor.tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**ids, pixel_values_videos=encoded, max_new_tokens=32, do_sample=False)
        answer = processor.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question}\n    {answer}")
        talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("video", help="any that FFmpeg reads; as many frames are taken as the checkpoint says, else 32")
    parser.add_argument("question", nargs="+", help="one after the other")
    given = parser.parse_args()
    main(given.checkpoint, given.video, *given.question)
