"""The time to the first token of the rows that can be called as users call a model: one video, one question.

    calls = {arm: first_token(model, arm, made(model, arm, options)) for arm in arms if can_be_called(arm)}
    timed(calls, questions, {}, 20, model.device)      # -> {arm: (0.015, 0.016, ...), ...}, seconds by video

All rows answer about a video in turn, so that whatever else the machine does meets all of them alike. Nothing is
compiled by Inductor: rows differ in what they compute alone. A model as small as this one has little to compute, and
most of its time is what any call takes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from earlytom_compile.benchmarks.measure import timed as seconds_of
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld.answers import FIRST_TOKEN, normalized, prompt_ids
from earlytom_compile.toyworld.baselines import Plain
from earlytom_compile.toyworld.batches import BEFORE
from earlytom_compile.toyworld.evaluate import Arm, Questions
from earlytom_compile.toyworld.installed import Compress, Installed, Model, own_options
from earlytom_compile.toyworld.methods import ALL_TOKENS, PLAIN
from earlytom_compile.toyworld.questions import Question
from earlytom_compile.toyworld.worlds import TOY, World

Call = Callable[[torch.Tensor, Question], torch.Tensor]
"""From the pixels of a video, [F, 3, H, W], and a question about it to ids that end in the first new token."""
_WARM_UP = 2  # calls of each: the first one traces the model


def can_be_called(arm: Arm) -> bool:
    """Whether its time says something; that of what is written from the specification does not."""
    return arm.method in (ALL_TOKENS, *PLAIN) or own_options(arm.method) is not None


def first_token(model: Model, arm: Arm, compress: Compress, world: World = TOY) -> Call:
    """``generate`` of one token, for an arm that :func:`can_be_called` and the method that was :func:`made` of it."""
    if isinstance(compress, Installed):
        return partial(_generate, compress.model, world)
    if isinstance(compress, Plain):
        return lambda pixels, question: _generate_behind(model, world, compress.tokens(pixels), question)
    return partial(_generate, model, world)


def _generate(model: Any, world: World, pixels: torch.Tensor, question: Question) -> torch.Tensor:
    tokens = len(pixels) * ModelShape.from_config(model.config).pooled_tokens
    ids = torch.tensor([prompt_ids(question, tokens + 1, world.ids)], device=pixels.device)
    said: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels[None], **FIRST_TOKEN
    )
    return said


def _generate_behind(model: Any, world: World, tokens: torch.Tensor, question: Question) -> torch.Tensor:
    """The same with these tokens, [K, C], in the place of those that the model would make of pixels."""
    words = model.get_input_embeddings()(torch.tensor(prompt_ids(question, 0, world.ids), device=tokens.device))
    before, behind = words[: len(BEFORE)], words[len(BEFORE) :]
    prompt = torch.cat([before, tokens, model.model.image_newline[None], behind])[None]
    there = torch.ones(prompt.shape[:2], dtype=torch.int64, device=tokens.device)
    said: torch.Tensor = model.generate(inputs_embeds=prompt, attention_mask=there, **FIRST_TOKEN)
    return said


@torch.no_grad()
def timed(
    calls: Mapping[Arm, Call],
    questions: Questions,
    known: Mapping[Arm, tuple[float, ...]],
    videos: int,
    device: torch.device,
    save: Callable[[dict[Arm, tuple[float, ...]]], None] = lambda seconds: None,
) -> dict[Arm, tuple[float, ...]]:
    """Seconds of the first question about each of the first ``videos``, by row; those that are ``known`` stay.

    ``save`` gets all of them after each video.
    """
    found = {arm: tuple(known.get(arm, ())) for arm in calls}
    missing = [arm for arm in calls if len(found[arm]) < videos]
    for arm in missing:
        for _ in range(_WARM_UP):
            calls[arm](*_asked(questions, 0, device))
    for number in range(videos):
        pixels, question = _asked(questions, number, device)
        for arm in missing:
            if len(found[arm]) == number:
                seconds, _ = seconds_of(partial(calls[arm], pixels, question), device)
                found[arm] = (*found[arm], seconds)
        save(dict(found))
    return found


def _asked(questions: Questions, number: int, device: torch.device) -> tuple[torch.Tensor, Question]:
    return normalized(questions.frames[number].to(device)), questions.asked[number][0]
