"""Policy + model + mesh → sharded model; its weights seen whole again for saving, loading and optimizers."""

from tp_plugin.shard.apply import is_sharded, model_type, models_in, parallelize
from tp_plugin.shard.lazy_load import settle_whole
from tp_plugin.shard.optimizer import NOT_ELEMENTWISE, shard_optimizer
from tp_plugin.shard.lazy_full_tensor import fulfil, has_promise, promises
from tp_plugin.shard.replicas import agree_on_weights
from tp_plugin.shard.state_dict import local_states

__all__ = [
    "NOT_ELEMENTWISE",
    "agree_on_weights",
    "fulfil",
    "has_promise",
    "is_sharded",
    "local_states",
    "model_type",
    "models_in",
    "parallelize",
    "promises",
    "settle_whole",
    "shard_optimizer",
]
