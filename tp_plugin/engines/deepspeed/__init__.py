"""DeepSpeed: its own ZeRO over the DP groups, by its ``mpu`` interface.

config.py      which keys of a DeepSpeed config are ours, and which are incompatible with ``tp_size``
groups.py      the ``mpu``, and DeepSpeed's collectives: counted, and none over a group of one
norms.py       gradient norms of the whole model, in each of its optimizers
initialize.py  ``deepspeed.initialize`` and ``zero.Init``
data.py        one batch per TP group from ``deepspeed_io``
checkpoint.py  ``save_checkpoint``, ``load_checkpoint``, ``save_16bit_model`` and consolidated weights
"""
