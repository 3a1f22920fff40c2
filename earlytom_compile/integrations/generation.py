"""What transformers' ``generate()`` does with the prompt besides handing it to the model.

It counts the prompt in ``max_length``, infers the mask from it, and shows it to streamers, stopping criteria and
logits processors. A prompt that was cut is shorter than the caller's, and nobody but the model may notice:

    kwargs = named_arguments(model, args, kwargs)
    reason_against(model, kwargs)                   # (reason, cure) where the ids of the prompt are needed
    shorten_limits(model, kwargs, dropped=1400)
    show_own_prompt(kwargs, ids, cut_length)
    output = with_own_prompt(generate(cut_ids, **kwargs), ids, cut_ids)
"""

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .checks import by_place

_BY_IDS = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def named_arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model.generate``, each by its name; raises :class:`TypeError` as Python."""
    names = by_place(type(model), "generate")
    if len(args) > len(names):
        raise TypeError(f"generate() takes at most {len(names)} positional arguments, got {len(args)}")
    named = dict(zip(names, args, strict=False))
    for name in named.keys() & kwargs.keys():
        raise TypeError(f"generate() got multiple values for argument {name!r}")
    return {**named, **kwargs}


def option(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """An option of ``generate``, which comes by name, in a config, or with the model; None if nobody says."""
    for place in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if kwargs.get(name) is None and getattr(place, name, None) is not None:
            return getattr(place, name)
    return kwargs.get(name)


def reason_against(model: Any, kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, cure) where transformers wants the prompt as ids, and finds nothing or something else in embeddings."""
    if option(model, kwargs, "prefill_chunk_size"):
        return "prefill_chunk_size cuts the prompt by its ids", "Leave it out: the cut prompt is short"
    by_ids = [name for name in _BY_IDS if option(model, kwargs, name) not in (None, 0, 1.0)]
    if by_ids:
        return f"{by_ids[0]} reads the prompt's ids, and the cut prompt comes as embeddings", f"Leave {by_ids[0]} out"
    assisted = [name for name in _ASSISTED if option(model, kwargs, name)]
    if kwargs.get("assistant_model") is not None:
        assisted.insert(0, "assistant_model")
    if assisted:
        return (
            f"assisted decoding ({assisted[0]}) looks for the prompt's ids, and the cut prompt comes as embeddings",
            f"Leave {assisted[0]} out",
        )
    return None


def inferred_mask(model: Any, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The attention mask [R, S] that ``generate`` infers from ids where none is given; it cannot from embeddings."""
    padding, ends = option(model, kwargs, "pad_token_id"), option(model, kwargs, "eos_token_id")
    known = isinstance(padding, int) and padding not in (ends if isinstance(ends, list | tuple) else (ends,))
    return ids.ne(padding).to(ids.dtype) if known else torch.ones_like(ids)


def warn_of_right_padding(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """What transformers says of rows that end in padding; it looks at ids, and gets embeddings from us.

    ``ids`` and ``mask`` [R, S], on the host; ``mask`` None where the caller gave none."""
    padding, ends = option(model, kwargs, "pad_token_id"), option(model, kwargs, "eos_token_id")
    padding = padding if padding is not None else ends[0] if isinstance(ends, list | tuple) else ends
    if padding is None or len(ids) < 2:
        return
    if bool((mask[:, -1] == 0).any() if mask is not None else (ids[:, -1] == padding).any()):
        logging.getLogger("transformers.generation.utils").warning(
            "right-padding was detected: rows of the batch end in padding, behind which a decoder-only model "
            "cannot go on rightly. Set padding_side='left' on the tokenizer."
        )


def shorten_limits(model: Any, kwargs: dict[str, Any], dropped: int) -> None:
    """``max_length`` and ``min_length`` count the prompt, which is ``dropped`` tokens shorter now."""
    for name in ("max_length", "min_length"):
        limit = option(model, kwargs, name)
        if limit and option(model, kwargs, name.replace("_length", "_new_tokens")) is None:
            shorter = max(limit - dropped, 0)
            if kwargs.get(name) is None and kwargs.get("generation_config") is not None:
                # Beside a config transformers does not like to see options of their own.
                kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
                setattr(kwargs["generation_config"], name, shorter)
            else:
                kwargs[name] = shorter


def show_own_prompt(kwargs: dict[str, Any], ids: torch.Tensor, cut_length: int) -> None:
    """Streamers, stopping criteria and logits processors see the caller's prompt, not the cut one."""
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], ids)
    if (criteria := kwargs.get("stopping_criteria")) is not None:
        kwargs["stopping_criteria"] = type(criteria)([_criterion(each, ids, cut_length) for each in criteria])
    if (processors := kwargs.get("logits_processor")) is not None:
        kwargs["logits_processor"] = type(processors)([_Processor(each, ids, cut_length) for each in processors])
    if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
        kwargs["prefix_allowed_tokens_fn"] = lambda row, seen: allowed(row, torch.cat((ids[row], seen[cut_length:])))


def with_own_prompt(output: Any, ids: torch.Tensor, cut_ids: torch.Tensor) -> Any:
    """Put the caller's prompt ids back in front of the new tokens, for each returned sequence; what does not begin with
    the cut prompt is returned as it is."""
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    if not isinstance(sequences, torch.Tensor) or sequences.dim() != 2 or len(sequences) % len(ids):
        return output
    copies, length = len(sequences) // len(ids), cut_ids.shape[1]
    prompts, cut = (each.to(sequences.device).repeat_interleave(copies, dim=0) for each in (ids, cut_ids))
    if not torch.equal(sequences[:, :length], cut):
        return output
    sequences = torch.cat((prompts, sequences[:, length:]), dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


class _PromptStreamer:
    """Hands a streamer the caller's own prompt in place of the cut one, then every token as it comes."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = input_ids

    def put(self, value: torch.Tensor) -> None:
        """The first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.to(value.device), None
        self._streamer.put(value)

    def end(self) -> None:
        """No more tokens."""
        self._streamer.end()


class _SeesOwnPrompt:
    """Hands a callee the caller's prompt and the new tokens; has its attributes, some of which transformers reads."""

    def __init__(self, callee: Callable[..., Any], ids: torch.Tensor, cut_length: int) -> None:
        self._callee = callee
        self._ids = ids
        self._cut_length = cut_length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_callee" not in self.__dict__:  # a copy that is being made has nothing yet
            raise AttributeError(name)
        return getattr(self._callee, name)

    def _restore(self, input_ids: torch.Tensor) -> torch.Tensor:
        prompts = self._ids.repeat_interleave(input_ids.shape[0] // self._ids.shape[0], dim=0)
        return torch.cat((prompts, input_ids[:, self._cut_length :]), dim=1)


class _Criterion(_SeesOwnPrompt):
    """A stopping criterion."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return self._callee(self._restore(input_ids), scores, **kwargs)


class _Processor(_SeesOwnPrompt):
    """A logits processor; transformers reads its signature, which must have these two arguments only."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self._callee(self._restore(input_ids), scores)


def _criterion(criterion: Any, ids: torch.Tensor, cut_length: int) -> Any:
    """``criterion`` for the cut prompt. Of transformers' own the type decides whether it replaces one that
    ``generate`` makes, so it stays: it counts the prompt, or looks at the last token, or at none."""
    from transformers.generation import stopping_criteria as own

    if type(criterion) is own.MaxLengthCriteria:
        criterion = copy.copy(criterion)
        criterion.max_length -= ids.shape[1] - cut_length
        return criterion
    if type(criterion) in (own.EosTokenCriteria, own.MaxTimeCriteria):
        return criterion
    return _Criterion(criterion, ids, cut_length)
