"""How attention is spelled in graphs: one table, to which an integration can add.

    torch.nn.functional.scaled_dot_product_attention(q, k, v, ...)      every finder's own spelling
    torch.matmul(softmax(torch.matmul(q, k.mT) * scale), v)             spelled out; torch.bmm over [T * H, S, d] too
    flex_attention(q, k, v, score_mod, block_mask, scale)               where it neither scores nor masks by itself
    flash_attn::_flash_attn_forward(q, k, v, ...)                       a custom operator, by the order of its arguments

    register_attention("mylib::attention", "query key value scale")                      # [T, H, S, d], as above
    register_attention("mylib::attention", "query key value", layout="tokens first")     # [T, S, H, d]

``canonicalize_attention`` writes all of them as ``scaled_dot_product_attention``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.patterns import CASTS, MOVES, argument, shape_of, value_of

Layout = Literal["heads first", "tokens first"]


@dataclass(frozen=True)
class Attention:
    """One attention as a graph computes it: softmax(query · keyᵀ * scale + mask) · value."""

    query: Node
    """[T, H, S, d], or [T, S, H, d] where tokens come first, or [T * H, S, d]."""
    key: Node
    """Likewise; [T, H, d, S] where ``key_transposed``."""
    value: Node
    scale: Any
    """A number, a node that yields one, or None for 1/sqrt(d)."""
    mask: Node | None = None
    causal: bool = False
    layout: Layout = "heads first"
    key_transposed: bool = False
    result: int | None = None
    """Which of several results is the mixed values; None where the op has one."""


Spelling = Callable[[Node], Attention | None]
"""Reads a node as an attention; None where it is none, or does more than an attention does."""

_SPELLINGS: dict[str, Spelling] = {}


def register_attention(
    operator: str, arguments: str, *, layout: Layout = "heads first", result: int | None = None
) -> None:
    """Declare that a custom operator computes attention.

    ``operator`` is ``"namespace::name"``; ``arguments`` are the names of its arguments in their order, of which
    ``query``, ``key`` and ``value`` are needed and ``scale``, ``mask``, ``causal`` and ``dropout`` have a meaning, what
    else it takes goes by ``_``, and must be None, False, 0, or a window of -1, which mean nothing. ``layout``:
    ``"heads first"`` [T, H, S, d] or ``"tokens first"`` [T, S, H, d], of operands and result. ``result``: which of
    several results holds the mixed values. Raises :class:`ValueError` if an operand is missing or ``layout`` unknown.
    """
    names = arguments.replace(",", " ").split()
    missing = {"query", "key", "value"} - set(names)
    if missing or "::" not in operator or layout not in ("heads first", "tokens first"):
        raise ValueError(
            f"register_attention({operator!r}, {arguments!r}, layout={layout!r}): the operator is 'namespace::name', "
            "its arguments have query, key and value among them, and the layout is 'heads first' or 'tokens first'."
        )

    def read(node: Node) -> Attention | None:
        given = dict(zip(names, node.args, strict=False))
        rest = [
            *node.args[len(names) :],
            *(value for name, value in zip(names, node.args, strict=False) if name == "_"),
        ]
        for name, value in node.kwargs.items():
            known = {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale", "is_causal": "causal"}.get(
                name, name
            )
            if known in names and known != "_":
                given[known] = value
            else:
                rest.append(value)
        if any(not _means_nothing(value) for value in (*rest, given.get("dropout"))):
            return None
        query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "mask"))
        if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
            return None
        if mask is not None and not isinstance(mask, Node):
            return None
        causal = bool(given.get("causal"))
        return Attention(query, key, value, given.get("scale"), mask, causal, layout, result=result)

    _SPELLINGS[operator] = read


def attention_of(node: Node) -> Attention | None:
    """What ``node`` computes, if it is an attention in a known spelling other than PyTorch's own function."""
    spelling = _SPELLINGS.get(op_name(node))
    return spelling(node) if spelling is not None else None


def _means_nothing(value: Any) -> bool:
    return value in (None, False, 0, 0.0, -1, (-1, -1), [-1, -1]) if not isinstance(value, Node) else False


# flash-attn 2: scales, then a window, a cap, slopes of ALiBi, and whether to return probabilities.
register_attention(
    "flash_attn::_flash_attn_forward",
    "query key value dropout scale causal _ _ _ _ _",
    layout="tokens first",
    result=0,
)
register_attention("flash_attn_3::_flash_attn_forward", "query key value scale", layout="tokens first", result=0)


def _spelled_out(output: Node) -> Attention | None:
    """``matmul(softmax(matmul(q, kT) * scale + mask), v)``, unless somebody else reads the weights."""
    weights, value = output.args[:2] if len(output.args) == 2 else (None, None)
    softmax = _softmax_behind(weights)
    if softmax is None or not isinstance(value, Node):
        return None
    scores, mask = _split_mask(softmax.args[0])
    product, scale = _split_scale(scores)
    if op_name(product) not in ("matmul", "bmm") or len(product.users) != 1:
        return None
    query, key = product.args[:2]
    if not (isinstance(query, Node) and isinstance(key, Node)) or len(shape_of(query) or ()) not in (3, 4):
        return None
    return Attention(query, key, value, scale, mask, key_transposed=True)


def _softmax_behind(weights: Any) -> Node | None:
    """The softmax over keys that made ``weights``, if nobody else reads it and no dropout is active."""
    node = weights
    while isinstance(node, Node) and op_name(node) in CASTS and len(node.users) == 1:
        if op_name(node) == "dropout":
            active = argument(node, 1, "p", 0.5) and argument(node, 2, "training", True)
            if active:
                return None
        node = node.args[0]
    if not isinstance(node, Node) or op_name(node) != "softmax" or len(node.users) != 1:
        return None
    last = len(shape_of(node) or ()) - 1
    return node if argument(node, 1, "dim") in (-1, last) else None


def _split_mask(scores: Any) -> tuple[Any, Node | None]:
    """``scores + mask`` -> (scores, mask): the mask is the side that is not computed from a matmul."""
    if not isinstance(scores, Node) or op_name(scores) != "add" or len(scores.users) != 1:
        return scores, None
    left, right = scores.args[:2]
    for product, mask in ((left, right), (right, left)):
        if isinstance(mask, Node) and _is_product(_split_scale(product)[0]):
            return product, mask
    return scores, None


def _is_product(node: Any) -> bool:
    return isinstance(node, Node) and op_name(node) in ("matmul", "bmm")


def _split_scale(scores: Any) -> tuple[Any, Any]:
    """``product * s`` or ``product / s`` -> (product, factor), a factor to divide by as ``("/", node)``."""
    name = op_name(scores) if isinstance(scores, Node) else ""
    if name not in ("mul", "truediv", "div") or len(scores.users) != 1:
        return scores, 1.0
    left, right = scores.args[:2]
    if isinstance(left, (int, float)):
        left, right = right, left
        if name != "mul":
            return scores, 1.0
    if isinstance(right, (int, float)):
        return left, float(right) if name == "mul" else 1.0 / right
    if isinstance(right, Node) and value_of(right) is not None and shape_of(right) is None:
        return left, right if name == "mul" else ("/", right)
    return scores, 1.0


_SPELLINGS["matmul"] = _SPELLINGS["bmm"] = _spelled_out


def _flex(node: Node) -> Attention | None:
    """``flex_attention`` whose score function hands its score on and whose mask says yes to everything."""
    query, key, value, score, block_mask, scale = node.args[:6]
    nodes = (query, key, value)
    if not all(isinstance(x, Node) for x in nodes) or not isinstance(block_mask, (tuple, list)):
        return None
    if not (_hands_on(score) and _says_yes(block_mask[-1])):
        return None
    return Attention(query, key, value, scale, result=0)  # type: ignore[arg-type]


def _body(node: Any) -> tuple[list[Node], Any]:
    """(arguments, result) of the function that a higher-order operator gets."""
    owner = node.graph.owning_module if isinstance(node, Node) else None
    module = owner.get_submodule(str(node.target)) if owner is not None else None
    graph = getattr(module, "graph", None)
    if graph is None:
        return [], None
    output = next(each for each in graph.nodes if each.op == "output").args[0]
    single = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output
    return [each for each in graph.nodes if each.op == "placeholder"], single


def _hands_on(score: Any) -> bool:
    arguments, result = _body(score)
    return bool(arguments) and result is arguments[0]


def _says_yes(mask: Any) -> bool:
    _, result = _body(mask)
    return isinstance(result, Node) and op_name(result) in ("new_ones", "ones", "ones_like")


_SPELLINGS["flex_attention"] = _flex


def heads_of(query: Node) -> int | None:
    """H of a query [T * H, S, d], read off the [T, H, S, d] it was made of; None if that is not to be seen."""
    rows = shape_of(query)[0]  # type: ignore[index]
    node: Any = query
    while isinstance(node, Node) and op_name(node) in MOVES | {"mul", "div", "truediv"} and node.args:
        node = node.args[0]
        shape = shape_of(node) or ()
        if len(shape) == 4 and shape[0] * shape[1] == rows and isinstance(shape[1], int):
            return int(shape[1])
    return None


def attention_operators() -> list[str]:
    """The custom operators that are known, for messages."""
    return sorted(name for name in _SPELLINGS if "::" in name)
