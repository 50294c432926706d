"""sentence-transformers' trainer: negatives of all processes, a loss in pieces, a shared evaluator; what it logged."""

from __future__ import annotations

import random

from accelerate import PartialState
from common import arguments, logged, write
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)

LOSSES = {
    "cosine": lambda model: CosineSimilarityLoss(model),
    "ranking": lambda model: MultipleNegativesRankingLoss(model),
    "gathered": lambda model: MultipleNegativesRankingLoss(model, gather_across_devices=True),
    "cached": lambda model: CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=2, gather_across_devices=True
    ),
}  # fmt: skip


def pairs(count: int, scored: bool, seed: int) -> Dataset:
    chance = random.Random(seed)

    def words() -> str:
        return " ".join(f"w{chance.randrange(100)}" for _ in range(chance.randint(3, 9)))

    rows = [{"first": words(), "second": words(), "score": chance.random()} for _ in range(count)]
    return Dataset.from_list(rows if scored else [{k: row[k] for k in ("first", "second")} for row in rows])


def tuned(args, name: str) -> dict:
    model = SentenceTransformer(str(args.models / args.model))
    scored = name == "cosine"
    test = pairs(11, True, 2)
    evaluator = EmbeddingSimilarityEvaluator(test["first"], test["second"], test["score"], name="pairs")
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(args.out / name), use_cpu=True, seed=5, max_steps=4, learning_rate=1e-3, max_grad_norm=0.5,
        per_device_train_batch_size=4, per_device_eval_batch_size=3, logging_steps=1, eval_strategy="steps",
        eval_steps=2, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=pairs(40, scored, 1), eval_dataset=pairs(10, scored, 3),
        loss=LOSSES[name](model), evaluator=evaluator,
    )  # fmt: skip
    trainer.train()
    embedded = model.encode(["w1 w2 w3", "w4 w5"]).tolist()
    model.save_pretrained(str(args.out / name / "final"))
    PartialState().wait_for_everyone()
    reloaded = SentenceTransformer(str(args.out / name / "final")) if PartialState().is_main_process else None
    return {
        "log": logged(trainer),
        "embedded": embedded,
        "reloaded": reloaded and reloaded.encode(["w6 w7", "w8"]).tolist(),
    }


def main():
    args = arguments().parse_args()
    found = {name: tuned(args, name) for name in LOSSES}
    if PartialState().is_main_process:
        write(args.out / "report.json", found)


if __name__ == "__main__":
    main()
