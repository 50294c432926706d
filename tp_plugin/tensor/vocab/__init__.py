"""Logits of a vocabulary that is split over the ranks: whole to the script, local in memory."""

from tp_plugin.tensor.vocab import sums, views  # what can be done with them
from tp_plugin.tensor.vocab.head import VocabularyColumns
from tp_plugin.tensor.vocab.tensor import Logits

__all__ = ["Logits", "VocabularyColumns", "sums", "views"]
