"""Run a script unchanged under FSDP2 on CPU, for which Accelerate alone wants a GPU.

accelerate launch --config_file CONFIG examples/plain_fsdp2.py SCRIPT [ARGUMENTS ...]
"""

import os
import runpy
import sys

import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType

os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_CPU="false")
PartialState._prepare_backend = lambda self, *settings: ("gloo", DistributedType.MULTI_GPU)
torch.distributed.init_process_group("gloo")  # which PartialState leaves to others if it is told to use the CPU
del sys.argv[0]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
