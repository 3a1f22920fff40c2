"""vLLM's engine in a process of its own, asked over a pipe: what one engine leaves behind in a process (distributed
groups, compiled code, settings) meets no other, and one that hangs is killed.

with Engine(model=folder, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}}) as engine:
    engine.ask([{"prompt": "<video> ...", "multi_modal_data": {"video": frames}}])      # [Answer]
"""

import contextlib
import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

START_S, ASK_S = 400, 400


@dataclass(frozen=True)
class Answer:
    words: list[int]
    prompt: list[int]
    cached: int


class EngineFailed(Exception):
    """What was raised in the engine's process, as text."""


class Engine:
    def __init__(self, environment: dict[str, str] | None = None, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, environment or {}, arguments))
        self._process.start()
        theirs.close()
        try:
            self._receive(START_S)
        except BaseException:
            self.close()
            raise

    def ask(self, prompts: list[dict[str, Any]], tokens: int = 1, **sampling: Any) -> list[Answer]:
        self._pipe.send(("ask", prompts, {"max_tokens": tokens, "temperature": 0, **sampling}))
        return self._receive(ASK_S)

    def look(self, what: str) -> Any:
        """One of the functions below that look at the model in the engine."""
        self._pipe.send(("look", what, None))
        return self._receive(ASK_S)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            self._process.kill()
            raise TimeoutError(f"the engine did not answer within {seconds} s")
        try:
            error, value = self._pipe.recv()
        except EOFError:
            raise EngineFailed(f"the engine's process ended with {self._process.exitcode}") from None
        if error:
            raise EngineFailed(error)
        return value


def _serve(pipe: Any, environment: dict[str, str], arguments: dict[str, Any]) -> None:
    os.environ.update(
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    )
    os.environ.update(environment)
    try:
        from vllm import LLM, SamplingParams

        defaults = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0}
        llm = LLM(**{**defaults, **arguments})
    except Exception as error:  # all of it is for the test to look at
        pipe.send((_text(error), None))
        return
    pipe.send((None, None))
    while (message := pipe.recv()) is not None:
        kind, what, sampling = message
        try:
            if kind == "look":
                value = llm.apply_model(_LOOKS[what])
            else:
                outputs = llm.generate(what, SamplingParams(**sampling), use_tqdm=False)
                value = [
                    Answer(list(each.outputs[0].token_ids), list(each.prompt_token_ids), each.num_cached_tokens or 0)
                    for each in outputs
                ]
            pipe.send((None, value))
        except Exception as error:
            pipe.send((_text(error), None))
    os._exit(0)  # vLLM's threads and groups need no farewell


def _text(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _class(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _graphs(model: Any) -> list[str]:
    """What each graph is for that compresses videos."""
    return [record.cause for record in model._video_path.records()]


def _count(model: Any) -> None:
    """From now on, how many videos each step encodes."""
    embed, model.counted = model.embed_multimodal, []

    def counting(**arguments: Any) -> Any:
        model.counted.append(len(arguments["pixel_values_videos"]))
        return embed(**arguments)

    model.embed_multimodal = counting


def _counted(model: Any) -> list[int]:
    return model.counted


_LOOKS = {"class": _class, "graphs": _graphs, "count": _count, "counted": _counted}
