"""The batch size of a config that the script's own code makes: of processes, if the code multiplies by their number.

``ds_config["train_batch_size"] = per_device * torch.distributed.get_world_size() * steps`` (DeepSpeed-Chat) counts each
TP rank. Taken for that of the replicas, DeepSpeed would derive ``tp_size`` times as many accumulation steps from it.
"""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from typing import Any

from tp_plugin.mesh.groups import Mesh

logger = logging.getLogger(__name__)


def count_replicas(config: dict[str, Any], mesh: Mesh) -> None:
    """Make ``train_batch_size`` that of the replicas, in place, if the running script computed it from the world."""
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    if not (isinstance(total, int) and isinstance(micro, int) and micro > 0):
        return
    steps, rest = divmod(total, micro * mesh.tp_size * mesh.dp_size)
    if rest or steps != (config.get("gradient_accumulation_steps") or steps) or not multiplied_by_world(_script()):
        return
    config |= {"train_batch_size": total // mesh.tp_size, "gradient_accumulation_steps": steps}
    if mesh.is_leader:
        logger.warning(
            f"train_batch_size {total} was computed from the number of processes, of which {mesh.tp_size} are one "
            f"replica: it is taken for {total // mesh.tp_size} = {micro} x {steps} accumulation steps x {mesh.dp_size} "
            "replicas"
        )


def multiplied_by_world(source: str) -> bool:
    """Whether a script assigns something to ``"train_batch_size"`` that names the world's size."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return any(_names_world(value, tree) for node in ast.walk(tree) for value in _batch_sizes(node))


def _batch_sizes(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Assign) and any(_is_key(getattr(target, "slice", None)) for target in node.targets):
        return [node.value]
    if isinstance(node, ast.Dict):
        return [value for key, value in zip(node.keys, node.values, strict=True) if _is_key(key)]
    return []


def _is_key(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == "train_batch_size"


def _names_world(value: ast.AST, tree: ast.AST) -> bool:
    """Whether an expression names the world's size, or a variable that was made from it."""
    names = [getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "value", None) for n in ast.walk(value)]
    if any(isinstance(name, str) and "world_size" in name.lower() for name in names):
        return True
    given = [a for a in ast.walk(tree) if isinstance(a, ast.Assign) and a.value is not value]
    behind = [a.value for a in given for t in a.targets if isinstance(t, ast.Name) and t.id in names]
    return any("world_size" in ast.unparse(v).lower() for v in behind)


def _script() -> str:
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return Path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError):
        return ""
