"""The server of ``transformers serve``, with a compiled model among those that it has loaded.

    pip install 'transformers[serving]'
    python examples/transformers_serve.py path/to/checkpoint --port 8000

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "path/to/checkpoint",
        "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/videos/talk.mp4"}},
                                                  {"type": "text", "text": "What is on the slide?"}]}]}'

A request takes other than 32 frames with ``"chat_template_kwargs": {"num_frames": 8}``. LLaVA-OneVision reads whatever
FFmpeg reads; other models read with transformers' own means, which take torchcodec and an FFmpeg of its kind. Needs
transformers 5.20 or newer, which has these classes.
"""

import argparse
from typing import Any

import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cli.serving import ModelManager, build_server
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

import earlytom_compile
from earlytom_compile import EarlyTomError
from earlytom_compile.integrations.preprocess import VideoTextProcessor

HANDLERS = (ChatCompletionHandler, CompletionHandler, ResponseHandler, TranscriptionHandler, SystemOneHandler)


def say_what_is_wrong(request: Request, error: Exception) -> JSONResponse:
    """With a video, to whoever sent it; else it would be in the server's log alone."""
    return JSONResponse({"error": {"message": str(error)}}, status_code=400)


def processor_of(checkpoint: str, model_type: str) -> Any:
    """One that takes videos without sound: the server asks for the sound of each, and fails where there is none."""
    if model_type == "llava_onevision":
        return VideoTextProcessor.from_pretrained(checkpoint)  # never looks for it
    processor = AutoProcessor.from_pretrained(checkpoint)
    own = processor.apply_chat_template

    def apply_chat_template(*conversation: Any, load_audio_from_video: bool = False, **options: Any) -> Any:
        return own(*conversation, **options)

    processor.apply_chat_template = apply_chat_template
    return processor


def main(checkpoint: str, host: str, port: int) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto", device_map="auto").eval()
    earlytom_compile.compile(model, retain_ratio=0.1)
    processor = processor_of(checkpoint, model.config.model_type)

    models, state = ModelManager(), GenerationState()
    models.loaded_models[models.process_model_name(checkpoint)] = TimedModel(model, -1, processor)  # -1: it stays
    app = build_server(models, *(handler(models, state) for handler in HANDLERS), generation_state=state)
    app.add_exception_handler(EarlyTomError, say_what_is_wrong)
    uvicorn.run(app, host=host, port=port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a name on the Hub; requests name it as their model")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    main(**vars(parser.parse_args()))
