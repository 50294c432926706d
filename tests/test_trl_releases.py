"""Releases of TRL that compute in another way than the one that is patched: refused where they do, not at import."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_plugin.engines import patching, trl
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.param_entry import ParamEntry, bind


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with patching.taken_back():
        yield


def share() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    bind(weight, ParamEntry("lm_head.weight", ParamLayout((4, 3), 0, (((0, 2),), ((2, 4),)))))
    return weight


def test_a_release_without_a_fused_head_computes_from_the_logits() -> None:
    utils: Any = SimpleNamespace(selective_log_softmax=lambda logits, index: None)  # 0.24, which LLaMA-Factory pins
    before = dict(vars(utils))
    trl.install(utils)
    trl.install_chunks(utils)
    assert vars(utils) == before


class Function(torch.autograd.Function):
    """TRL 1.14's."""

    @staticmethod
    def forward(ctx: Any, last_hidden: Any, weight: Any, bias: Any, targets: Any, temperature: Any) -> Any:
        return last_hidden @ weight.t()


def test_another_fused_head_is_refused_at_its_use() -> None:
    utils: Any = SimpleNamespace(_ChunkedLogProbFunction=Function)
    trl.install(utils)
    x = torch.ones(1, 3)
    assert utils._ChunkedLogProbFunction.apply(x, torch.ones(4, 3), None, None, 1.0).tolist() == [[3.0] * 4]
    with pytest.raises(TPError, match=r"this loss of trl 1\.\d+.* multiplies by lm_head.weight itself"):
        utils._ChunkedLogProbFunction.apply(x, share(), None, None, 1.0)
    patching.unpatch_all()
    assert "apply" not in vars(Function)


def test_chunks_of_tokens_are_refused_at_their_use() -> None:
    trainer: Any = SimpleNamespace(_chunk=lambda hidden, w, b: hidden @ w.t())  # SFT's in 1.4 to 1.14
    trl.install_chunks(trainer)
    assert trainer._chunk(torch.ones(1, 3), torch.ones(4, 3), None).shape == (1, 4)
    with pytest.raises(TPError, match="this loss of trl"):
        trainer._chunk(torch.ones(1, 3), w=share(), b=None)


def test_the_known_fused_head_is_replaced() -> None:
    from trl.kernels import ChunkedLogProbFunction

    utils: Any = SimpleNamespace(_ChunkedLogProbFunction=ChunkedLogProbFunction, maybe_gather_lm_head_ctx=None)
    trl.install(utils)
    assert isinstance(utils._ChunkedLogProbFunction, trl._LogProbs)


def test_rewards_that_are_asked_for_otherwise_are_refused_when_a_trainer_is_made() -> None:
    class RLOOTrainer:
        """0.20's, which has no ``_calculate_rewards``."""

    trl.install_rewards(SimpleNamespace(RLOOTrainer=RLOOTrainer))
    with pytest.raises(TPError, match=r"RLOOTrainer of trl .* asks for rewards"):
        RLOOTrainer()
