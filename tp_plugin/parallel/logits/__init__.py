"""Logits of a vocabulary that is split over the ranks: whole to the script, local in memory."""

from tp_plugin.parallel.logits import sums, views  # what can be done with them
from tp_plugin.parallel.logits.head import VocabularyColumns
from tp_plugin.parallel.logits.reading import desk
from tp_plugin.parallel.logits.tensor import Logits

__all__ = ["Logits", "VocabularyColumns", "desk", "sums", "views"]
