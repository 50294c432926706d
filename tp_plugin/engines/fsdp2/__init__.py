"""FSDP2 × TP: torch's ``fully_shard`` splits what a TP rank holds over the DP group.

config.py      what is incompatible with ``tp_size``, refused before a model is loaded
wrapping.py    ``fully_shard`` over the DP group; layouts and gradient sums follow to the parameters it makes
prepare.py     Accelerate's own preparation of a model for FSDP2
checkpoint.py  model and optimizer states in torch's distributed checkpoint API: whole, or in whole-model coordinates
"""
