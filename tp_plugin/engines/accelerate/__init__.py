"""Accelerate: a world of tp × dp ranks is shown to the script as dp processes.

state.py       how many processes there are, and which one this is
operations.py  gather, reduce and broadcast over the right ranks
loaders.py     one batch per TP group
prepare.py     sharding at ``prepare``, DDP over the DP group, checkpoints
"""
