"""Parameters, gradients and what is computed of them, as the script sees them: whole, although a rank holds a shard.

Inside forward, backward and optimizer step they are ordinary tensors of this rank's shard. Outside, region.py gives
the same objects a class whose operations dispatch.py carries out: element by element on shards, reductions by one
all-reduce, anything else on the whole tensor, which whole.py gathers.
"""

from tp_plugin.tensor.global_view import classes  # noqa: F401  (registers them)
from tp_plugin.tensor.global_view.dispatch import Calls
from tp_plugin.tensor.global_view.info import GlobalInfo, Peers, any_global, as_global, info_of, is_global, local_of
from tp_plugin.tensor.global_view.region import ScriptRegion

__all__ = [
    "Calls", "GlobalInfo", "Peers", "ScriptRegion", "any_global", "as_global", "info_of", "is_global", "local_of",
]  # fmt: skip
