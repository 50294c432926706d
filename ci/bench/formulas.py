"""What a rank of a tensor-parallel Llama holds and sends, by formula. fp32 unless ``width`` says otherwise.

    b batch, s tokens, h hidden, i inner, a heads, g key/value heads, d = head size, L layers, v vocabulary, t = tp

Sources: Shoeybi et al. 2019 (Megatron-LM), section 3: what is split, two reductions a block and direction. Korthikanti
et al. 2022, section 4: the method of counting kept activations, here for Llama's operations, tensor by tensor. Patarasu
and Yuan 2009: a ring all-reduce puts 2 (t - 1) / t times its bytes on the wire. AdamW keeps two states of each
parameter's shape (Loshchilov and Hutter 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Llama:
    """A Llama without biases, its head untied; t divides all."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def layer_parameters(self, tp: int) -> int:
        """(2 h (a + g) d + 3 h i) / t for the matrices, and the two norms whole: 2 h."""
        attention = 2 * self.hidden * (self.heads + self.groups) * self.head_size
        return (attention + 3 * self.hidden * self.inner) // tp + 2 * self.hidden

    def parameters(self, tp: int) -> int:
        """L layers, embedding and head 2 v h / t, the last norm h."""
        return self.layers * self.layer_parameters(tp) + 2 * self.vocabulary * self.hidden // tp + self.hidden

    def kept_by_layer(self, batch: int, tokens: int, tp: int, sequence_parallel: bool = False) -> int:
        """Numbers that autograd keeps of a layer for the backward.

        Each norm: its input, the normalised input, its output: 6 h in all, on every rank (with sequence parallelism
        6 h / t). Attention: queries, keys, values and the output, which the kernel gives in the order in which the
        projection takes it: (2 a + 2 g) d / t, and the sum of exponents of each head, a / t. MLP: gate, its activation,
        up, their product: 4 i / t. Per token besides: the two norms' roots. Where queries, keys and values were
        computed as one (``fuse``), what the values are kept in is the storage of all three: (a + g) d / t more.
        """
        norms = 6 * self.hidden + 2
        inside = 2 * (self.heads + self.groups) * self.head_size + self.heads + 4 * self.inner
        if tp > 1:
            inside += (self.heads + self.groups) * self.head_size
        return batch * tokens * (norms // (tp if sequence_parallel else 1) + inside // tp)

    def kept_by_layer_in_bf16(self, batch: int, tokens: int, tp: int) -> int:
        """The same in bytes, in bf16 with a fused attention kernel.

        A norm keeps its input in fp32, the normalised input and its output in bf16: 8 h bytes. The kernel keeps its
        exponents' sums in fp32.
        """
        inside = 2 * (2 * (self.heads + self.groups) * self.head_size + 4 * self.inner) + 4 * self.heads
        if tp > 1:
            inside += 2 * (self.heads + self.groups) * self.head_size
        return batch * tokens * (16 * self.hidden + 8 + inside // tp)

    def local_logits(self, batch: int, tokens: int, tp: int) -> int:
        """b s v / t."""
        return batch * tokens * self.vocabulary // tp

    def sent(self, batch: int, tokens: int, tp: int, sequence_parallel: bool = False) -> int:
        """Numbers that a rank puts on the wire in a step.

        All-reduces of b s h: 2 a layer and direction, the embedding's, the gradient of the head's input. With sequence
        parallelism each block has a gather and a reduce-scatter a direction, half an all-reduce each, and one gather
        more for its input in the backward; the stack joins its tokens once and once more in the backward; the norms'
        gradients are summed, 2 h a layer. The loss gathers three numbers of each token: maximum, sum of exponents, the
        label's logit.
        """
        half = (tp - 1) * batch * tokens * self.hidden // tp
        loss = (tp - 1) * 3 * batch * tokens
        if not sequence_parallel:
            return 2 * (4 * self.layers + 2) * half + loss
        norms = 2 * (tp - 1) * 2 * self.layers * self.hidden // tp
        return (10 * self.layers + 4 + 2) * half + norms + loss

    def layer_flops(self, batch: int, tokens: int) -> int:
        """Of a layer's forward and backward, unsharded: 6 per matrix weight and token, and causal attention's two
        products, 3 (one forward, two backward) x 2 x 2 a d s² / 2 (Narayanan et al. 2021, halved for the mask)."""
        matrices = self.layer_parameters(1) - 2 * self.hidden
        return 6 * batch * tokens * matrices + 6 * batch * tokens * tokens * self.heads * self.head_size


def on_the_wire(nbytes: Mapping[str, int], tp: int) -> float:
    """What a rank sends for collectives on inputs of so many bytes, in rings."""
    factors = {"all_reduce": 2 * (tp - 1) / tp, "reduce_scatter": (tp - 1) / tp, "all_gather": tp - 1}
    return sum(count * factors[key.partition("/")[0]] for key, count in nbytes.items())
