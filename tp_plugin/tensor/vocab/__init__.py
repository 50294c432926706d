"""The loss over a vocabulary that is split over the ranks: its logits are whole to the script, local in memory.

What stays split, with what it communicates per token in the forward, and who uses it:

- Views of whole rows, copies, casts, ``logits[mask]``: nothing. Every trainer; sequences shifted by one.
- ``+ - * /`` with numbers, one per token, a bias over the vocabulary, other logits; ``neg tanh exp``: nothing.
  Cohere (scale), Granite (division), Gemma (soft-capping), BART (bias), TRL (temperature, entropy), label smoothing.
- ``cross_entropy`` with labels: one all-gather of 3 numbers, 4 with ``label_smoothing``. Every model's own loss.
- ``log_softmax``, ``softmax``, ``logsumexp``: one all-gather of 2 or 3 numbers. TRL's log-probabilities, distillation.
- ``gather``, ``take_along_dim``, ``nll_loss``, ``sum``, ``mean``, ``kl_div``: one all-reduce of 1 number per result.
- ``argmax``, ``max``, ``topk``: two all-gathers of k numbers. Metrics, TRL's distillation by top-k.

Their gradients need at most one all-reduce of one number, and are computed block by block inside of the head's own
backward. Everything else is called on the gathered logits (a message in the log says so, once for each function): right
all the same, with the exact gradient, but each rank then holds all columns. Writing into logits gathers them as well.
"""

from tp_plugin.tensor.peer_reads import Held, PeerReads
from tp_plugin.tensor.vocab import reductions, views  # register what can be done with logits
from tp_plugin.tensor.vocab.head import FusedForward, VocabularyColumns
from tp_plugin.tensor.vocab.logits import Logits
from tp_plugin.tensor.vocab.vocabulary import Vocabulary

__all__ = ["FusedForward", "Held", "Logits", "PeerReads", "Vocabulary", "VocabularyColumns", "reductions", "views"]
