"""DeepSpeed configs as users write them, and the cases that several launches run."""

from __future__ import annotations

import json
from pathlib import Path

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)
AUTO_SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 3}}
TRAINER = (
    "--output_dir {out}/trainer --num_train_epochs 2 --learning_rate 1e-3 --weight_decay 0.1 --adam_epsilon 1e-6 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_grad_norm 0.5 --logging_steps 1 "
    "--warmup_steps 2 --eval_strategy steps --eval_steps 4 --save_steps 4 --save_total_limit 2 "
    "--load_best_model_at_end true --report_to none --disable_tqdm true --seed 5"
)


def zero(stage: int, **changes) -> dict:
    """Buckets so small that every boundary is crossed."""
    section = {"stage": stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
    if stage == 3:
        section |= {"stage3_param_persistence_threshold": 50, "stage3_prefetch_bucket_size": 2000}
        section |= {"stage3_gather_16bit_weights_on_model_save": True}
    return section | changes


def accelerate(stage: int, changes: dict | None = None, **more) -> dict:
    """For a script that brings torch's AdamW."""
    config = {**AUTO_BATCH, "gradient_clipping": 0.5, "zero_optimization": zero(stage, **(changes or {}))}
    return config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | more


def trainer(stage: int) -> dict:
    section = {"stage": stage}
    if stage == 3:
        sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        section |= dict.fromkeys(sizes, "auto") | {"stage3_gather_16bit_weights_on_model_save": True}
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    config = {**AUTO_BATCH, "gradient_clipping": "auto", "zero_optimization": section}
    return config | {"optimizer": optimizer, "scheduler": AUTO_SCHEDULE}


def direct(stage: int) -> dict:
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6}}
    return config | {"zero_optimization": zero(stage), "optimizer": optimizer, "scheduler": WARMUP}


DUMMY = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-6}},
    "scheduler": AUTO_SCHEDULE,
}
BF16 = {"bf16": {"enabled": True}}

# name -> script, checkpoint, config, further arguments (of which `{config}` is the path of the config)
CASES = {
    "stage0": ("zero_loop", "llama", accelerate(0), ["--plugin", "{config}"]),
    "stage1": ("zero_loop", "llama_tied", accelerate(1), ["--plugin", "{config}"]),
    "stage2": ("zero_loop", "gpt2", accelerate(2, OFFLOADED), ["--plugin", "{config}"]),
    "stage3": ("zero_loop", "llama_tied", accelerate(3), ["--plugin", "{config}"]),
    "offload3": (
        "zero_loop",
        "gpt2",
        accelerate(3, OFFLOADED | {"offload_param": {"device": "cpu"}}),
        ["--plugin", "{config}"],
    ),
    "dummies": ("zero_loop", "llama", accelerate(1, **DUMMY), ["--plugin", "{config}"]),
    "bf16_stage0": ("zero_loop", "llama", accelerate(0, **BF16), ["--plugin", "{config}"]),
    "bf16_stage3": ("zero_loop", "llama", accelerate(3, **BF16), ["--plugin", "{config}"]),
    "fp32_stage3": ("zero_loop", "llama", accelerate(3), ["--plugin", "{config}"]),
    "trainer1": ("zero_trainer", "llama", trainer(1), ["--deepspeed", "{config}", *TRAINER.split()]),
    "trainer3": ("zero_trainer", "llama_tied", trainer(3), ["--deepspeed", "{config}", *TRAINER.split()]),
    "path0": ("zero_direct", "llama", direct(0), ["--deepspeed_config", "{config}"]),
    "path2": ("zero_direct", "llama_tied", direct(2), ["--deepspeed_config", "{config}", "--early"]),
    "code3": ("zero_direct", "gpt2", direct(3), ["--code", "{config}"]),
    "save_state1": ("zero_loop", "llama", accelerate(1), ["--plugin", "{config}", "--save", "state"]),
    "load_state1": (
        "zero_loop",
        "llama",
        accelerate(1),
        ["--plugin", "{config}", "--save", "nothing", "--resume", "{root}/save_state1/state"],
    ),
    "save_state3": ("zero_loop", "llama_tied", accelerate(3), ["--plugin", "{config}", "--save", "state"]),
    "load_state3": (
        "zero_loop",
        "llama_tied",
        accelerate(3),
        ["--plugin", "{config}", "--save", "nothing", "--resume", "{root}/save_state3/state"],
    ),
}

STAGES = ["stage0", "stage1", "stage2", "stage3"]
LAUNCHES = {
    # (tp, dp) -> how it is started, where tp_size stands, what it runs
    (2, 1): ("zero accelerate", "JSON", [*STAGES, "bf16_stage0", "trainer3", "save_state1", "load_state1"]),
    (2, 2): ("zero torchrun", "code", [*STAGES, "offload3", "dummies", "bf16_stage3", "trainer1", "path0", "code3"]),
    (4, 1): ("zero accelerate", "YAML", [*STAGES, "path2", "save_state3", "load_state3"]),
}


def write_config(path: Path, config: dict, tp: int | None) -> str:
    """The config with our key; or the plain one, which must say that no optimizer is to be compiled on CPU."""
    config = json.loads(json.dumps(config))
    if tp is not None:
        config["tp_size"] = tp
    elif "optimizer" in config:
        config["optimizer"]["params"] = {"torch_adam": True, "weight_decay": 0.0} | config["optimizer"]["params"]
    path.write_text(json.dumps(config))
    return str(path)


def arguments(folder: Path, name: str, models: Path, tp: int | None) -> list[str]:
    """A case's command line; its config is written to ``folder``."""
    _, model, config, more = CASES[name]
    path = write_config(folder / f"{name}.json", config, tp)
    return ["--models", str(models), "--model", model, *(word.replace("{config}", path) for word in more)]


def write_plan(folder: Path, names: list[str], models: Path, tp: int | None) -> Path:
    """The plan of a chain (scripts/zero_chain.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = [[name, CASES[name][0], arguments(folder, name, models, tp)] for name in names]
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder / "plan.json"
