"""Cut the prompt to the tokens that are left (``masked_scatter`` over S positions -> S' positions).

Before: ``embeds = embedding(input_ids)  # [R, S, C]`` ... ``masked_scatter(embeds, input_ids == video, rows)``
After:  ``keep = keep_positions(input_ids, video, before, after, S')  # [R, S']``
        ``ids = take_positions(input_ids, keep); mask = take_positions(attention_mask, keep)`` ... all else follows

Each video keeps the first of its placeholders, as many as it has tokens left. Every graph input that carries the
sequence axis (found by data flow) is cut at the start of the graph; given position ids close the gaps, so that
kept tokens are numbered as if the prompt had been written with the smaller video.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.axes import AxisMap
from earlytom_compile.passes.find_video_boundary import Boundary
from earlytom_compile.passes.insert_token_selection import SelectedTokens
from earlytom_compile.passes.patterns import MOVES, insert, op_name, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis


@dataclass(frozen=True)
class SequenceInputs:
    """Graph inputs with one position a prompt token; R rows, S positions."""

    input_ids: Node  # [R, S]
    masks: tuple[Node, ...]  # [R, S]
    positions: tuple[Node, ...]  # [R or 1, S]
    others: tuple[Node, ...]  # [R, S, ...], such as embeddings


def find_sequence_inputs(axes: AxisMap, input_ids: Node) -> SequenceInputs:
    """All graph inputs on the sequence axis of ``input_ids``; raises NotApplicable where one cannot be cut."""
    masks, positions, others = [], [], []
    for node, dim in axes.members(input_ids, 1):
        if node.op != "placeholder" or node is input_ids:
            continue
        value = value_of(node)
        shape = tuple(map(str, shape_of(node) or ()))
        if isinstance(value, torch.nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
            raise NotApplicable(
                f"the weight {node.target} of shape {shape} is as long as the prompt and cannot be cut with it",
                "Models with learned embeddings of whole prompts are not supported",
            )
        if dim != 1:
            raise NotApplicable(
                f"the graph input {node.target} of shape {shape} has the prompt on axis {dim}",
                "Give masks and positions as [rows, prompt length]",
            )
        if value.is_floating_point() or value.dim() > 2:  # type: ignore[union-attr]
            others.append(node)
        elif value.dtype == torch.bool or _is_used_as_truth(node):  # type: ignore[union-attr]
            masks.append(node)
        elif _is_used_as_positions(node):
            positions.append(node)
        else:
            raise NotApplicable(
                f"the graph input {node.target} of shape {shape} is neither used as a mask nor as positions",
                "Leave it out, or use earlytom_compile.compile(model) and generate()",
            )
    return SequenceInputs(input_ids, tuple(masks), tuple(positions), tuple(others))


def compact_sequence(
    graph: Graph, boundary: Boundary, selected: SelectedTokens, inputs: SequenceInputs, even_rows: bool
) -> tuple[Node, dict[Node, ResizedAxis]]:
    """Insert the cut; returns the positions that stay, [R, S'], and what each graph input has become. Unless
    ``even_rows``, rows have different numbers of videos, and S' is known at run time only."""
    carriers = (inputs.input_ids, *inputs.masks, *inputs.others, *inputs.positions)
    consumers = {node: list(node.users) for node in carriers}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        if isinstance(selected.budget, int) and even_rows:
            keep, length = _keep_exactly(graph, boundary, selected.budget)
        else:
            keep, length = _keep_ragged(graph, boundary, selected, inputs)
        axes = {}
        for node in carriers:
            cut = _cut_positions(graph, node, keep) if node in inputs.positions else _cut(graph, node, keep)
            cut.meta["example_value"] = value_of(node)
            axes[node] = ResizedAxis(cut, 1, "prompt", length)
            for consumer in consumers[node]:
                consumer.replace_input_with(node, cut)
    return keep, axes


def _keep_exactly(graph: Graph, boundary: Boundary, budget: int) -> tuple[Node, Node | int]:
    ids = boundary.placeholders.input_ids  # type: ignore[union-attr]
    rows, positions = shape_of(ids)  # type: ignore[misc]
    frames = int(boundary.frames)
    before = boundary.rows_of(frames)
    after = before - frames * boundary.tokens + budget
    dropped = boundary.videos // int(rows) * (before - after)
    length: Node | int
    if isinstance(positions, int):
        length = positions - dropped
    else:
        length = insert(graph, operator.sub, insert(graph, torch.ops.aten.sym_size.int, ids, 1), dropped)
    token = boundary.placeholders.token  # type: ignore[union-attr]
    keep = insert(graph, torch.ops.earlytom.keep_positions.default, ids, token, before, after, length)
    return keep, length


def _keep_ragged(
    graph: Graph, boundary: Boundary, selected: SelectedTokens, inputs: SequenceInputs
) -> tuple[Node, Node]:
    rows = int(shape_of(inputs.input_ids)[0])  # type: ignore[index]
    if rows > 1 and not inputs.masks:
        raise NotApplicable(
            "the prompts of this batch keep different numbers of tokens, and without an attention_mask the shorter "
            "ones cannot be padded",
            "Pass the attention_mask of the processor",
        )
    kept = selected.kept_counts
    if kept is None:
        device = value_of(inputs.input_ids).device  # type: ignore[union-attr]
        kept = insert(graph, torch.full, (boundary.videos,), selected.budget, dtype=torch.int64, device=device)
    if boundary.separator is not None:
        kept = insert(graph, operator.add, kept, 1)
    token = boundary.placeholders.token  # type: ignore[union-attr]
    keep = insert(
        graph,
        torch.ops.earlytom.keep_positions_ragged.default,
        inputs.input_ids,
        kept,
        token,
        boundary.rows_of(int(boundary.frames)),
    )
    return keep, insert(graph, torch.ops.aten.sym_size.int, keep, 1)


def _cut(graph: Graph, node: Node, keep: Node) -> Node:
    return insert(graph, torch.ops.earlytom.take_positions.default, node, keep, 0.0)


def _cut_positions(graph: Graph, node: Node, keep: Node) -> Node:
    """A kept token moves up by the number of tokens dropped before it; padding stays at 0 or above."""
    sizes = (insert(graph, torch.ops.aten.sym_size.int, keep, dim) for dim in (0, 1))
    rows, length = sizes
    taken = _cut(graph, insert(graph, "expand", node, rows, -1), keep)
    index = insert(graph, torch.arange, length, device=value_of(node).device)  # type: ignore[union-attr]
    padding = insert(graph, operator.lt, keep, 0)
    index = insert(graph, operator.sub, index, insert(graph, "sum", padding, 1, keepdim=True))
    dropped = insert(graph, operator.sub, keep, index)
    closed = insert(graph, "clamp_min", insert(graph, operator.sub, taken, dropped), 0)
    return insert(graph, "masked_fill", closed, padding, 0)


def _is_used_as_truth(node: Node) -> bool:
    """True if every use of the integer input asks whether it is zero, as masks are used."""
    pending, truths = list(node.users), 0
    while pending:
        user = pending.pop()
        target = user.kwargs.get("dtype") or next((arg for arg in user.args if isinstance(arg, torch.dtype)), None)
        if op_name(user) in ("bool", "ne", "eq", "logical_not") or target is torch.bool:
            truths += 1
        elif op_name(user) in MOVES:
            pending.extend(user.users)
        else:
            return False
    return truths > 0


def _is_used_as_positions(node: Node) -> bool:
    """True if every use of the integer input ends in a product with frequencies, as in rotary embeddings."""
    pending, products = list(node.users), 0
    while pending:
        user = pending.pop()
        if op_name(user) in MOVES or op_name(user) == "getitem":
            pending.extend(user.users)
        elif op_name(user) in ("mul", "matmul") and value_of(user).is_floating_point():  # type: ignore[union-attr]
            products += 1
        else:
            return False
    return products > 0
