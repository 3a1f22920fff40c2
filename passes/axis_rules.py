"""What each op says about the axes of its arguments: arithmetic, products, reductions, layers, new tensors.

    linear(x [8, 9, 48], weight [96, 48]) -> [8, 9, 96]     48 is 48; 8, 9 and 96 go on
    arange(81) -> [81]                                      81 is spelled here, whatever it turns out to be

Rules of ops that only rearrange are in ``axis_rules_layout``, those of slicing and indexing in
``axis_rules_indexing``. Names cover all spellings: ``torch.add``, ``Tensor.add_``, ``operator.iadd`` and
``aten.add.Tensor`` are all ``add``.
"""

from __future__ import annotations

from typing import Any

from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.axis_call import ONE, Call, Dims, NoRule, Outputs, TensorAxes, rule, wrap
from earlytom_compile.passes.patterns import einsum_letters

POINTWISE = (
    # Arithmetic
    "mul", "div", "truediv", "floordiv", "floor_divide", "true_divide", "pow", "mod", "remainder", "fmod",
    "rmul", "rtruediv", "rdiv", "rfloordiv", "rpow", "multiply", "divide", "maximum", "minimum", "fmax",
    "fmin", "atan2", "hypot", "logaddexp", "lerp", "addcmul", "addcdiv", "complex", "polar", "where", "copysign",
    # Comparison and logic
    "eq", "ne", "lt", "le", "gt", "ge", "not_equal", "greater", "greater_equal", "less", "less_equal",
    "and", "or", "xor", "not", "invert", "isin",
    "logical_and", "logical_or", "logical_xor", "logical_not",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "lshift", "rshift",
    "isclose", "isnan", "isinf", "isfinite",
    # One argument
    "neg", "negative", "pos", "positive", "abs", "absolute", "sign", "sgn", "square", "sqrt", "rsqrt",
    "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos",
    "atan", "sinh", "cosh", "tanh", "erf", "erfc", "erfinv", "sigmoid", "logit", "floor", "ceil", "round", "trunc",
    "frac", "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max", "conj", "real", "imag", "angle",
    # Activations
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "threshold", "softshrink", "hardshrink",
    "rrelu", "dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
)  # fmt: skip


@rule(*POINTWISE)
def pointwise(call: Call, input: Any, *others: Any, **named: Any) -> Dims:
    """Broadcasting, whatever is computed."""
    if call.name == "where" and not others and not named:
        raise NoRule("where(condition) lists positions")
    shapes = [call.dims(x) for x in (input, *others, *named.values()) if call.is_tensor(x)]
    if call.name == "isin":
        return shapes[0]
    return call.broadcast(*shapes)


@rule("add", "sub", "radd", "rsub", "subtract")
def add(call: Call, input: Any, other: Any, *, alpha: Any = 1) -> TensorAxes:
    """Broadcasting; positions plus 0 are still positions."""
    dims = call.broadcast(*(call.dims(x) for x in (input, other) if call.is_tensor(x)))
    untouched = isinstance(other, int) and other == 0 and call.name != "rsub"
    return TensorAxes(dims, call.index_of(input) if untouched else None)


SAME_VALUES = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "short", "cpu", "cuda",
    "contiguous", "clone", "detach", "alias", "get_data_attr", "lift_fresh", "requires_grad", "pin_memory",
)  # fmt: skip


@rule(*SAME_VALUES)
def same_values(call: Call, input: Any, *_: Any, **__: Any) -> TensorAxes:
    return call.tensor(input)


SHAPE_OF_FIRST = (
    "bool", "byte", "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "tril", "triu",
    "flip", "fliplr", "flipud", "roll", "normalize", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "zero", "fill", "normal", "uniform", "bernoulli", "bucketize",
)  # fmt: skip


@rule(*SHAPE_OF_FIRST)
def shape_of_first(call: Call, input: Any, *_: Any, **__: Any) -> Dims:
    """The result has the axes of the first argument."""
    return call.dims(input)


@rule("masked_fill", "copy")
def written_over(call: Call, input: Any, other: Any, *_: Any, **__: Any) -> Dims:
    call.broadcast(call.dims(input), call.dims(other))
    return call.dims(input)


@rule("masked_scatter")
def masked_scatter(call: Call, input: Any, mask: Any, source: Any) -> Dims:
    """The source is read in order as far as the mask says: its axes have no partner."""
    call.broadcast(call.dims(input), call.dims(mask))
    return call.dims(input)


# Reductions


def _reduced(call: Call, dims: Dims, dim: Any, keepdim: bool) -> Dims:
    chosen = range(len(dims)) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    gone = {wrap(d, len(dims)) for d in chosen}
    return tuple(Dim(ONE) if i in gone else d for i, d in enumerate(dims) if keepdim or i not in gone)


@rule("sum", "mean", "nansum", "nanmean", "amax", "amin", "all", "any", "prod", "logsumexp", "count_nonzero",
      "argmax", "argmin")  # fmt: skip
def reduction(call: Call, input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> TensorAxes:
    dims = call.dims(input)
    positions = dims[wrap(dim, len(dims))] if call.name.startswith("arg") and isinstance(dim, int) else None
    return TensorAxes(_reduced(call, dims, dim, keepdim), positions)


@rule("max", "min", "median", "mode")
def extremum(call: Call, input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    if call.is_tensor(dim):
        return call.broadcast(call.dims(input), call.dims(dim))
    dims = call.dims(input)
    kept = _reduced(call, dims, dim, keepdim)
    return Outputs([kept, TensorAxes(kept, dims[wrap(dim, len(dims))])]) if call.several else kept


@rule("var", "std", "var_mean", "std_mean")
def variance(call: Call, input: Any, dim: Any = None, *_: Any, keepdim: bool = False, **__: Any) -> Any:
    kept = _reduced(call, call.dims(input), None if isinstance(dim, bool) else dim, keepdim)
    return Outputs([kept, kept]) if call.several else kept


@rule("norm", "linalg_norm", "linalg_vector_norm", "vector_norm")
def norm(call: Call, input: Any, p: Any = None, dim: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return _reduced(call, call.dims(input), dim, keepdim)


@rule("cosine_similarity")
def cosine_similarity(call: Call, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Dims:
    return _reduced(call, call.broadcast(call.dims(x1), call.dims(x2)), dim, False)


@rule("sort", "topk", "argsort")
def ordering(call: Call, input: Any, *options: Any, dim: int | None = None, **_: Any) -> Any:
    dims = list(call.dims(input))
    place = 1 if call.name == "topk" else 0
    position = dim if dim is not None else options[place] if len(options) > place else -1
    if isinstance(position, bool):
        raise NoRule("the dimension is not where it is expected")
    at = wrap(position, len(dims))
    along = dims[at]
    if call.name == "topk":
        dims[at] = call.pinned(call.out[at])
    if call.name == "argsort":
        return TensorAxes(tuple(dims), along)
    return Outputs([tuple(dims), TensorAxes(tuple(dims), along)])


# Products


@rule("matmul", "rmatmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call, input: Any, other: Any = None, **named: Any) -> Dims:
    left = call.dims(input)
    right = call.dims(other if other is not None else next(iter(named.values()), None))
    if call.name == "rmatmul":
        left, right = right, left
    call.unify(left[-1], right[-2] if len(right) > 1 else right[0])
    batch = call.broadcast(left[:-2], right[:-2])
    return (*batch, *left[-2:-1], *right[-1:][: len(right) - 1])


@rule("addmm", "baddbmm")
def addmm(call: Call, input: Any, mat1: Any, mat2: Any, **_: Any) -> Dims:
    return call.broadcast(matmul(call, mat1, mat2), call.dims(input))


@rule("outer")
def outer(call: Call, input: Any, vec2: Any) -> Dims:
    return (*call.dims(input), *call.dims(vec2))


@rule("einsum")
def einsum(call: Call, equation: str, *operands: Any) -> Dims:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if "->" not in equation:
        raise NoRule("only einsum equations with -> are known")
    shapes = [call.dims(operand) for operand in operands]
    terms, result = einsum_letters(equation, [len(shape) for shape in shapes])
    axes: dict[str, Dim] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, dim in zip(term, shape, strict=True):
            known = axes.setdefault(letter, dim)
            if not dim.size.is_(1) and not known.size.is_(1):
                call.unify(known, dim)
            elif known.size.is_(1):
                axes[letter] = dim
    return tuple(axes[letter] for letter in result)


@rule("linear")
def linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Dims:
    *lead, inner = call.dims(input)
    *out, again = call.dims(weight)
    call.unify(inner, again)
    if bias is not None and out:
        call.unify(out[0], call.dims(bias)[0])
    return (*lead, *out)


@rule("earlytom::reuse_attention")
def reuse_attention(call: Call, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Dims:
    """Says what the model's own attention said, in whose place it stands: [1, H, T, E], twice, and [1, H, T, Ev]."""
    (*lead, depth), (*key_lead, key_depth), (*value_lead, value_depth) = map(call.dims, (query, key, value))
    call.unify(depth, key_depth)
    return (*call.broadcast(lead, key_lead, value_lead), value_depth)


@rule("earlytom::at_places")
def at_places(call: Call, table: Any, index: Any, axis: int) -> Dims:
    """The table keeps its places, and what comes out has a row of it for each packed place."""
    dims = list(call.dims(table))
    dims[axis].root.fixed = dims[axis].root.fixed or "what patches are reused by"
    dims[axis] = call.pinned(call.out[axis])
    return tuple(dims)


@rule("earlytom::window_attention")
def window_attention(call: Call, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Dims:
    """[T, H, S, E], twice, and [T, H, S, Ev] of the same places; windows follow no number of places but this one."""
    dims = attention(call, query, key, value)
    dims[2].root.fixed = dims[2].root.fixed or "the windows that attention stays in"
    return dims


@rule("scaled_dot_product_attention")
def attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> Dims:
    """[..., L, E], [..., S, E], [..., S, Ev] and a mask [..., L, S] -> [..., L, Ev]."""
    *lead, length, depth = call.dims(query)
    *key_lead, positions, key_depth = call.dims(key)
    *value_lead, value_positions, value_depth = call.dims(value)
    call.unify(depth, key_depth)
    call.unify(positions, value_positions)
    if enable_gqa:  # query heads are a multiple of the heads of key and value
        call.unify(key_lead.pop(), value_lead.pop())
        lead, heads = lead[:-1], lead[-1:]
    else:
        heads = []
    batch = (*call.broadcast(lead, key_lead, value_lead), *heads)
    if attn_mask is not None:
        call.broadcast((*batch, length, positions), call.dims(attn_mask))
    return (*batch, length, value_depth)


# Layers


@rule("layer_norm", "rms_norm")
def layer_norm(
    call: Call, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Dims:
    dims = call.dims(input)
    base = ("kwargs", "normalized_shape") if "normalized_shape" in call.node.kwargs else ("args", 1)
    if isinstance(normalized_shape, (tuple, list)):
        for i in range(1, len(normalized_shape) + 1):
            call.site((*base, len(normalized_shape) - i), dims[-i])
    call.broadcast(dims, *(call.dims(x) for x in (weight, bias) if x is not None))
    return dims


@rule("group_norm")
def group_norm(call: Call, input: Any, num_groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Dims:
    return _per_channel(call, input, weight, bias)


@rule("batch_norm", "instance_norm")
def batch_norm(
    call: Call,
    input: Any,
    mean: Any = None,
    var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Dims:
    return _per_channel(call, input, mean, var, weight, bias)


def _per_channel(call: Call, input: Any, *vectors: Any) -> Dims:
    dims = call.dims(input)
    for vector in vectors:
        if vector is not None:
            call.unify(dims[1], call.dims(vector)[0])
    call.forbid(dims[1:2], "is normalised in groups of")
    return dims


@rule("embedding")
def embedding(call: Call, input: Any, weight: Any, *_: Any, **__: Any) -> Dims:
    """Row numbers of a table: how many rows there are says nothing about the ids."""
    return (*call.dims(input), call.dims(weight)[1])


@rule("one_hot")
def one_hot(call: Call, input: Any, num_classes: Any = -1) -> Dims:
    return (*call.dims(input), call.pinned(call.out[-1]))


@rule("glu")
def glu(call: Call, input: Any, dim: int = -1) -> Dims:
    dims = list(call.dims(input))
    at = wrap(dim, len(dims))
    call.forbid([dims[at]], "is halved by")
    dims[at] = call.pinned(call.out[at])
    return tuple(dims)


@rule("unfold")
def unfold(call: Call, input: Any, *arguments: Any, **named: Any) -> Dims:
    """``x.unfold(dim, size, step)`` appends the axis of a window; ``F.unfold(x, kernel)`` lists whole patches."""
    dims = call.dims(input)
    if call.node.op == "call_method" or len(call.out) == len(dims) + 1:
        at = wrap(arguments[0] if arguments else named["dimension"], len(dims))
        call.forbid([dims[at]], "is cut into windows by")
        return (*dims[:at], call.pinned(call.out[at]), *dims[at + 1 :], call.pinned(call.out[-1]))
    call.forbid(dims[-3:], "is cut into patches by")
    return (*dims[:-3], *map(call.pinned, call.out[-2:]))


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call, input: Any, factor: int) -> Dims:
    dims = call.dims(input)
    call.forbid(dims[-3:], "is regrouped by")
    return (*dims[:-3], *map(call.pinned, call.out[-3:]))


def _spatial(call: Call, dims: Dims, count: int) -> Dims:
    """Axes that a window slides over: the op decides their new sizes."""
    call.forbid([dim for dim in dims[-count:] if not dim.size.is_(1)], "is resampled by")
    return tuple(call.pinned(size) for size in call.out[-count:])


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    call: Call, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: Any = 1,
) -> Dims:  # fmt: skip
    dims, kernel = call.dims(input), call.dims(weight)
    spatial = len(kernel) - 2
    channel = dims[-spatial - 1]
    if groups == 1:
        call.unify(channel, kernel[1])
    else:
        call.forbid([channel], "is split into groups by")
    if bias is not None:
        call.unify(kernel[0], call.dims(bias)[0])
    left_alone = [_is_window_of_one(i, kernel, stride, padding, spatial) for i in range(spatial)]
    call.forbid(
        [dim for dim, alone in zip(dims[-spatial:], left_alone, strict=True) if not alone and not dim.size.is_(1)],
        "is resampled by",
    )
    new = [
        dim if alone else call.pinned(size)
        for dim, alone, size in zip(dims[-spatial:], left_alone, call.out[-spatial:], strict=True)
    ]
    return (*dims[: -spatial - 1], kernel[0], *new)


def _is_window_of_one(axis: int, kernel: Dims, stride: Any, padding: Any, spatial: int) -> bool:
    """Whether a convolution looks at each position of an axis alone, as that of patches does at each frame."""

    def along(value: Any) -> Any:
        values = value if isinstance(value, (tuple, list)) else [value] * spatial
        return values[axis] if len(values) == spatial else values[0]

    return kernel[axis + 2].size.is_(1) and along(stride) == 1 and (padding == "valid" or along(padding) == 0)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def pooling(call: Call, input: Any, *_: Any, **__: Any) -> Dims:
    if call.several:
        raise NoRule("pooling with indices")
    dims, spatial = call.dims(input), int(call.name[-2])
    return _resampled(call, dims, spatial, 1, "output_size")


@rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def interpolate(call: Call, input: Any, *_: Any, **__: Any) -> Dims:
    dims = call.dims(input)
    return _resampled(call, dims, len(dims) - 2, 1, "size")


def _resampled(call: Call, dims: Dims, spatial: int, position: int, keyword: str) -> Dims:
    """Leading axes go on; sizes that are spelled belong to the new axes (a symint there is nobody else's)."""
    new = _spatial(call, dims, spatial)
    spelled = call.node.kwargs.get(keyword, call.node.args[position] if len(call.node.args) > position else None)
    base = ("kwargs", keyword) if keyword in call.node.kwargs else ("args", position)
    if isinstance(spelled, (tuple, list)) and len(spelled) == spatial:
        for i, dim in enumerate(new):
            call.site((*base, i), dim)
    return (*dims[:-spatial], *new)
