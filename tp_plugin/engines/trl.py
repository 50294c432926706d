"""TRL: its fused output head multiplies by ``lm_head.weight`` itself, of which a rank has some rows."""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import Any

import torch

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.whole_heads import is_share, refusing
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current, current_mesh, require
from tp_plugin.tensor.param_entry import layout_of
from tp_plugin.tensor.pipeline.stage_reads import StageReads
from tp_plugin.tensor.vocab import Vocabulary
from tp_plugin.tensor.vocab.scores import divergence, head_logits, scores

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's function gives after the log-probabilities, in its order."""


KNOWN = "trl>=1.16,<1.17"
SIGNATURE = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale"),
    "outputs",
)
"""What TRL's function takes, in the releases that :class:`_LogProbs` stands in for."""


def install(utils: Any) -> None:
    """Patch ``trl.trainer.utils``, whose head SFT, DPO, KTO, GRPO and RLOO share.

    An old release has none: it computes from the logits, which are those of the whole vocabulary to it. One that has it
    in another form is refused where it is used.
    """
    function = vars(utils).get("_ChunkedLogProbFunction")
    if function is None:
        return
    if tuple(inspect.signature(function.forward).parameters)[1:] == SIGNATURE:
        patch(utils, "_ChunkedLogProbFunction", _LogProbs(function, utils.maybe_gather_lm_head_ctx))
    else:
        applied = functools.partial(_refusing_release(), function.apply)
        patch(function, "apply", staticmethod(applied), inherited=True)


def install_chunks(trainer: Any) -> None:
    """Patch ``trl.trainer.sft_trainer``, or distillation's, of a release that projects chunks of tokens itself."""
    if "_chunk" in vars(trainer):
        wrap(trainer, "_chunk", _refusing_release())


def _refusing_release() -> Any:
    return refusing(f"this loss of {_release()}", f"install {KNOWN}, or take a loss of the logits")


def _release() -> str:
    return f"trl {metadata.version('trl')}"


def install_distillation(kernel: Any) -> None:
    """Patch ``trl.kernels.chunked_divergence``, which multiplies by the heads of student and teacher."""
    function = kernel.ChunkedDivergenceFunction
    applied = functools.partial(_divergence, function.apply, kernel.maybe_gather_lm_head_ctx)
    patch(function, "apply", staticmethod(applied), inherited=True)


def _divergence(
    original: Any,
    fetched: Any,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's signature and results, over the whole vocabulary where the heads are shares of it."""
    student = (student_hidden, student_weight, student_bias, student_logit_scale, student_final_logit_softcapping)
    teacher = (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_final_logit_softcapping)
    shares = [is_share(weight) for _, weight, *_ in (student, teacher)]
    runtime = current()
    if runtime is None or (not any(shares) and runtime.mesh.pp_size == 1):
        arguments = (beta, temperature, student[3], student[4], teacher[3], teacher[4])
        found: tuple[torch.Tensor, torch.Tensor] = original(*student[:3], *teacher[:3], *arguments)
        return found
    layouts = [layout_of(weight) for _, weight, *_ in (student, teacher)]
    mesh = runtime.mesh
    sizes = {layout.shape[0] for layout in layouts if layout is not None}
    if not all(shares) or None in layouts or len(sizes) > 1 or mesh.pp_size > 1:
        raise TPError(
            "TRL's distillation is computed over split vocabularies where student and teacher are both split, over the "
            "same vocabulary, without pp_size and FSDP2; load both by from_pretrained, or distil by the logits "
            "(outputs.logits)"
        )

    def logits(hidden: Any, weight: Any, bias: Any, scale: float, softcap: float | None) -> Any:
        local: Any = layout_of(weight)
        rows = Vocabulary(local.shape[0], local.local_shape(mesh.unit.rank)[0], mesh.tp, runtime.remote_logits)
        settings = {"scale": scale, "softcap": softcap, "temperature": temperature}
        again = functools.partial(fetched, weight, bias)
        return head_logits(hidden, weight, bias, rows, fetched=again, keep=not runtime.config.fused_head, **settings)

    with runtime.region.step(), fetched(*student[1:3]), fetched(*teacher[1:3]):
        with torch.no_grad():
            wanted = logits(*teacher)
        return divergence(logits(*student), wanted, beta)


def install_rewards(trainer: Any) -> None:
    """Patch ``trl.trainer.grpo_trainer`` or ``rloo_trainer``: a TP group has one reward per completion."""
    for name in ("GRPOTrainer", "RLOOTrainer"):
        cls = vars(trainer).get(name)
        if cls is not None and "_calculate_rewards" in vars(cls):
            wrap(cls, "_calculate_rewards", _calculate_rewards)
        elif cls is not None:
            patch(cls, "__init__", _refuse_trainer, inherited="__init__" not in vars(cls))


def _refuse_trainer(self: Any, *args: Any, **kwargs: Any) -> None:
    raise TPError(
        f"{type(self).__name__} of {_release()} asks for rewards in a way that tp_plugin does not know, "
        f"and the ranks of a TP group may be answered differently; install {KNOWN}, or set tp_size: 1"
    )


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
        if layout is None and is_share(weight):
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
            found = scores(head_logits(hidden, weight, bias, vocabulary, **settings), targets, outputs)
        return found["log_probs"], *(found.get(name) for name in OPTIONAL)
