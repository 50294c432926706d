"""TRL: its fused output head multiplies by ``lm_head.weight`` itself, of which a rank has some rows."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current, current_mesh, require
from tp_plugin.shard.params import is_unnamed_shard
from tp_plugin.tensor.param_entry import layout_of
from tp_plugin.tensor.pipeline.stage_reads import StageReads
from tp_plugin.tensor.vocab import Vocabulary
from tp_plugin.tensor.vocab.scores import scores

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's function gives after the log-probabilities, in its order."""


def install(utils: Any) -> None:
    """Patch ``trl.trainer.utils``, whose head SFT, DPO, KTO, GRPO and RLOO share."""
    if not hasattr(utils, "_ChunkedLogProbFunction") or not hasattr(utils, "maybe_gather_lm_head_ctx"):
        import trl

        raise TPError(
            f"trl {trl.__version__} computes log-probabilities in a way that this version of tp_plugin does not know, "
            "and would take a rank's part of the vocabulary for all of it; install trl>=1.16,<1.17, or set tp_size: 1"
        )
    patch(utils, "_ChunkedLogProbFunction", _LogProbs(utils._ChunkedLogProbFunction, utils.maybe_gather_lm_head_ctx))


def install_distillation(trainer: Any) -> None:
    """Patch ``trl.trainer.distillation_trainer``."""
    patch(trainer, "ChunkedDivergenceFunction", _Refused(trainer.ChunkedDivergenceFunction))


def install_rewards(trainer: Any) -> None:
    """Patch ``trl.trainer.grpo_trainer`` or ``rloo_trainer``: a TP group has one reward per completion."""
    for name in ("GRPOTrainer", "RLOOTrainer"):
        if name in vars(trainer):
            wrap(vars(trainer)[name], "_calculate_rewards", _calculate_rewards)


def _calculate_rewards(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The leader's: a judge or a sandbox need not answer each rank alike."""
    rewards, mesh = original(self, *args, **kwargs), current_mesh()
    return rewards if mesh is None else mesh.unit_for(rewards).broadcast(rewards.contiguous())


class _LogProbs:
    """In place of the autograd function: over the whole vocabulary where the weight is a share of it."""

    def __init__(self, original: Any, fetched: Any):
        self.original, self.fetched = original, fetched

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[torch.Tensor | None, ...]:
        """TRL's signature and results."""
        layout = layout_of(weight)
        runtime = current()
        staged = layout is not None and runtime is not None and runtime.mesh.pp_size > 1
        if staged and runtime.mesh.pp.rank < runtime.mesh.pp_size - 1:  # the last stage computes it
            nothing = hidden.new_zeros(len(targets), dtype=torch.float32)
            empty = {name: nothing for name in outputs} | {"is_top1": nothing.bool()}
            return nothing, *(empty[name] if name in outputs else None for name in OPTIONAL)
        if layout is None and runtime is not None and is_unnamed_shard(weight, [m.index for m in runtime.models]):
            raise TPError(
                f"TRL's head was given a weight of {tuple(weight.shape)} that is not a parameter of the model, but has "
                "the shape of this rank's rows of its vocabulary, and would be taken for all of it; do not copy "
                "lm_head.weight, or set tp_size: 1"
            )
        if layout is None or not layout.is_sharded or (staged and runtime.mesh.tp_size == 1):
            arguments = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            result: tuple[torch.Tensor | None, ...] = self.original.apply(hidden, weight, bias, targets, *arguments)
            return result
        # under ZeRO-3 TRL has gathered the head for now, and partitions it again before the backward
        settings: dict[str, Any] = {"fetched": functools.partial(self.fetched, weight, bias)}
        settings |= {"scale": logit_scale, "softcap": final_logit_softcapping, "temperature": temperature}
        settings["keep"] = not require().config.fused_head
        mesh, peers = require().mesh, require().remote_logits
        reads = StageReads(peers) if staged else peers
        vocabulary = Vocabulary(layout.shape[0], layout.local_shape(mesh.unit.rank)[0], mesh.tp, reads)
        with require().region.step():
            found = scores(hidden, weight, bias, targets, vocabulary, outputs, **settings)
        return found["log_probs"], *(found.get(name) for name in OPTIONAL)


class _Refused:
    def __init__(self, original: Any):
        self.original = original

    def apply(self, *args: Any) -> Any:
        """TRL's, unless a head is split."""
        layouts = [layout_of(arg) for arg in args if isinstance(arg, torch.Tensor)]
        if any(layout is not None and layout.is_sharded for layout in layouts):
            raise TPError(
                "TRL's DistillationTrainer multiplies by whole lm_head.weight of teacher and student, of which a rank "
                "has a part under tp_size; distil by the logits (outputs.logits), or set tp_size: 1"
            )
        return self.original.apply(*args)
