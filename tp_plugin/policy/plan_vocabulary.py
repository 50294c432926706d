"""Token embeddings and output heads, split by rows of the vocabulary."""

from __future__ import annotations

from tp_plugin.policy.blocks import Vocabulary
from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.lora import is_adapted, plan_vocabulary_adapters, variants_of
from tp_plugin.policy.packed import is_packed
from tp_plugin.policy.scope import Scope
from tp_plugin.policy.split import vocabulary_rows


def plan_vocabulary(scope: Scope, vocabulary: Vocabulary) -> None:
    """Claim the embeddings and the head that ``vocabulary`` names, where the model has them."""
    embeddings = vocabulary.embedding if isinstance(vocabulary.embedding, tuple) else (vocabulary.embedding,)
    wanted = [(pattern, scope.plan.embeddings) for pattern in embeddings] + [(vocabulary.head, scope.plan.heads)]
    for pattern, paths in wanted:
        for path in scope.matching(pattern) if pattern else ():
            for variant in variants_of(path, scope.modules[path]):
                _plan_rows(scope, variant, paths)


def _plan_rows(scope: Scope, path: str, paths: list[str]) -> None:
    module = scope.modules[path]
    base = f"{path}.base_layer" if is_adapted(module) else path
    if f"{base}.weight" not in scope.parameters:
        scope.fail(
            f"{path} is wrapped by {type(module).__name__}; of PEFT's wrappers of an embedding or a head, LoRA and "
            "modules_to_save can be sharded"
        )
    if is_packed(scope.modules[base]):
        scope.fail(f"{path} is quantized, which an output head is not by default: leave it out (llm_int8_skip_modules)")
    weight = tuple(scope.parameters[f"{base}.weight"].shape)
    parts, rows = vocabulary_rows(weight[0], scope.plan.tp)
    layout = ParamLayout(weight, 0, parts, pad_to=rows)
    scope.claim(f"{base}.weight", layout)
    if f"{base}.bias" in scope.parameters:
        scope.claim(f"{base}.bias", ParamLayout(weight[:1], 0, parts, pad_to=rows))
    paths.append(base)
    if is_adapted(module):
        plan_vocabulary_adapters(scope, path, module, layout)
