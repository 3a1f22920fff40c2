"""The words of the toy world, their tokenizer, and the prompt around a question.

<|im_start|> user <video> what color is the ring ? <|im_end|> <|im_start|> assistant  ->  red <|im_end|>
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from earlytom_compile.toyworld.questions import NUMBERS, WAYS
from earlytom_compile.toyworld.world import COLORS, SHAPES, SPEEDS

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<unk>")
"""In the order of their ids, from 0 on; the names are those of LLaVA-OneVision's checkpoints."""

_GRAMMAR = (
    "user assistant system what color is the shape thing things which way does go how fast many are in video first"
    " last scene has at comes or flashes column row start end , ?"
)
WORDS = tuple(dict.fromkeys([*COLORS, *SHAPES, *WAYS, *SPEEDS, *NUMBERS, *_GRAMMAR.split()]))
"""Every word there is; others read as ``<unk>``."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|> {{ message.role }} {% for part in message.content if part.type in ("image", "video") %}<{{ part.type }}> \
{% endfor %}
{%- for part in message.content if part.type == "text" %}{{ part.text }} {% endfor %}<|im_end|> {% endfor -%}
{%- if add_generation_prompt -%}<|im_start|> assistant{% endif -%}"""


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Words between spaces, in lower case; punctuation stands alone."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def prompt(question: str) -> str:
    """What the chat template makes of one user turn with a video."""
    return f"<|im_start|> user <video> {question} <|im_end|> <|im_start|> assistant"
