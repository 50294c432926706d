"""sentence-transformers (`pip install sentence-transformers`: it brings scipy and scikit-learn, not among ours)."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertModel

from .compare import LOSS, close
from .conftest import randomize
from .instruct import write_tokenizer

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedders")
    shape = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 90, "num_hidden_layers": 2}
    model = BertModel(
        BertConfig(**shape, vocab_size=131, hidden_dropout_prob=0, attention_probs_dropout_prob=0, pad_token_id=0)
    )
    randomize(model)
    model.save_pretrained(root / "model")
    write_tokenizer(root / "model")
    return root


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("loss", ["cosine", "ranking", "gathered", "cached"])
def test_the_numbers_are_those_of_dp_processes(bench, models, loss, dp):
    pytest.importorskip("sentence_transformers", reason="needs `pip install -c constraints.txt sentence-transformers`")
    args = ("--models", str(models), "--model", "model")
    got, expected = (bench.run("embedders", tp, dp, args, timeout=280).report[loss] for tp in (2, 1))
    for entry, other in zip(got["log"], expected["log"], strict=True):
        for name in [name for name in other if name.endswith("_cosine")]:  # correlations, and so numbers around 0
            assert entry.pop(name) == pytest.approx(other.pop(name), abs=LOSS)
    close(got["log"], expected["log"], LOSS, loss)
    for name in ("embedded", "reloaded"):
        for row, other in zip(got[name], expected[name], strict=True):
            assert row == pytest.approx(other, abs=LOSS)  # elements are about 1
