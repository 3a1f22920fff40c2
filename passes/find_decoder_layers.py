"""Find the layers of a language model by what they compute, in the order in which a prompt goes through them.

    h1 = h + project(attention(q(h), k(h), v(h)))      # causal, or masked; h: [R, S, C]

What follows the attention does not matter: all that is asked of a layer is the stream that enters it, and the attention
inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.find_vision_encoder import GraphView, Layer, is_bidirectional, stream_of
from earlytom_compile.passes.patterns import argument


@dataclass(frozen=True)
class DecoderLayer(Layer):
    """One layer; its keys may have fewer heads, [R, G, S, d]."""

    @property
    def mask(self) -> Node | None:
        """[R or 1, H or 1, S, T], as the attention reads it now."""
        return argument(self.attention, 3, "attn_mask")  # type: ignore[no-any-return]

    @property
    def causal(self) -> bool:
        """Whether the attention hides what comes later by itself."""
        return bool(argument(self.attention, 5, "is_causal", False))


def find_decoder_layers(view: GraphView, prompt: Node) -> list[DecoderLayer]:
    """All layers behind ``prompt``, ids [R, S] or [R, S, C] as it enters the language model; [] if there are none."""
    layers: list[DecoderLayer] = []
    positions, after = view.dims(prompt)[1], set(view.flow.behind(prompt))
    for node in view.graph.nodes:
        if node not in after or op_name(node) != "scaled_dot_product_attention" or is_bidirectional(node):
            continue
        operands = [operand for operand in node.args[:3] if isinstance(operand, Node)]
        stream = stream_of(view, node, operands) if _is_of(view, operands, positions) else None
        if stream is not None and view.dims(stream)[1] is positions:
            layers.append(DecoderLayer(stream, node))
    return layers


def _is_of(view: GraphView, operands: Sequence[Node], positions: object) -> bool:
    """Whether the queries are those of the prompt's ``positions``."""
    query = view.dims(operands[0]) if len(operands) == 3 else ()
    return len(query) == 4 and query[2] is positions
