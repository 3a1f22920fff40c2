"""A checkpoint folder with random weights that reads any text: byte-level BPE, LLaVA-OneVision's special tokens."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from earlytom_compile.toyworld.checkpoint import TinySize, build_model, save_checkpoint

# In order of their ids, from 0 on.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# One turn per message: visual placeholders first, then the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content if part.type in ("image", "video") %}<{{ part.type }}>
{% endfor %}
{%- for part in message.content if part.type == "text" %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

# What the tokenizer learns its merges from. Bytes it has never seen stay bytes, so any prompt can be encoded.
_CORPUS = (
    "the square moves right and the circle moves left across the dark screen",
    "a red square , a green circle and a blue bar stand still for two seconds",
    "then the scene is cut to a bright screen where the bar falls slowly",
    "what happens in the video ? first the circle grows , then it stops",
    "describe the shapes , their colours and how they move before and after the cut",
)


def write_checkpoint(folder: str | Path, size: TinySize, *, seed: int = 0) -> Path:
    """Build the model and its tokenizer and save both in ``folder``, which is made when missing."""
    tokenizer = build_tokenizer()
    model = build_model(size, tokenizer, seed=seed)
    model.generation_config.suppress_tokens = _not_words(tokenizer)
    return save_checkpoint(folder, model, tokenizer, CHAT_TEMPLATE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """With LLaVA-OneVision's special tokens."""
    return build_byte_tokenizer(SPECIAL_TOKENS, "<|im_end|>", "<|endoftext|>")


def build_byte_tokenizer(special: tuple[str, ...], end: str, padding: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on a handful of sentences; ``special`` tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=padding,
        additional_special_tokens=[token for token in special if token not in (end, padding)],
        padding_side="left",
    )


def _not_words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of bytes, parts of words and special tokens, which random weights would say as readily as words."""
    words = {"\u0120" + word for sentence in _CORPUS for word in sentence.split()}  # U+0120: a space
    return [i for token, i in tokenizer.get_vocab().items() if token not in words]
