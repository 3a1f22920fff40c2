"""The words of this world and their tokenizer; the prompt around a question is the toy world's.

<|im_start|> user <video> what color is the ring ? <|im_end|> <|im_start|> assistant  ->  red <|im_end|>
"""

from transformers import PreTrainedTokenizerFast

from earlytom_compile.toyworld import language
from earlytom_compile.toyworld.language import SPECIAL_TOKENS, prompt
from earlytom_compile.toyworld.questions import NUMBERS, WAYS
from earlytom_compile.toyworld.world import COLORS, SHAPES

_GRAMMAR = (
    "user assistant system what color is the shape thing things which way does go how many are in video first last"
    " scene times flash flashes appear comes or column row quarter , ?"
)
WORDS = tuple(dict.fromkeys([*COLORS, *SHAPES, *WAYS, *NUMBERS, *_GRAMMAR.split()]))
"""Every word there is; others read as ``<unk>``."""
IDS = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
BEFORE, AFTER = (text.split() for text in prompt("|").split("<video> | "))
"""Words before the video, and behind the question."""
END = IDS["<|im_end|>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, in lower case; punctuation stands alone."""
    return language.build_tokenizer(WORDS)
