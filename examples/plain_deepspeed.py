"""Run a script unchanged under DeepSpeed on CPU, without the C++ extension that DeepSpeed alone compiles at start-up.

accelerate launch --config_file CONFIG examples/plain_deepspeed.py SCRIPT [ARGUMENTS ...]
"""

import runpy
import sys

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a faster all-reduce; gloo's does the same
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
