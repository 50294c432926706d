"""Policy + model → sharded model; its weights seen full again for saving, loading and optimizers."""

from tp_plugin.shard.apply import is_sharded, model_type, models_in, parallelize
from tp_plugin.shard.lazy_full_tensor import has_lazy, materialize
from tp_plugin.shard.lazy_load import materialize_all_
from tp_plugin.shard.optimizer import NOT_ELEMENTWISE, shard_optimizer
from tp_plugin.shard.replicas import agree_on_weights
from tp_plugin.shard.state_form import lazy_full_tensors, local_states

__all__ = [
    "NOT_ELEMENTWISE",
    "agree_on_weights",
    "has_lazy",
    "is_sharded",
    "lazy_full_tensors",
    "local_states",
    "materialize",
    "materialize_all_",
    "model_type",
    "models_in",
    "parallelize",
    "shard_optimizer",
]
