"""What combines with what: each cell names the test that shows it; ci/combinations.py writes the docs' table.

A cell is "file::test", after a word where it is so in part only ("0–2 file::test"), "refused file::test" where that
test shows the message, or "" where there is nothing to combine.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reference" / "combinations.md"
BEGIN, END = "<!-- combinations: written by ci/combinations.py -->", "<!-- /combinations -->"

ENGINES = ("one replica", "DDP", "ZeRO 0–3", "FSDP2")

LOOP, ZERO_LOOP = "blackbox/test_loop.py::test_steps", "blackbox/test_zero_training.py::test_loop"
TRAINER = "blackbox/test_checkpoints.py::test_trainer_logs_what_it_logs_on_dp_processes"
TRAINERS, TRL = "blackbox/test_trainers.py::test_trainer", "blackbox/test_trainers.py::test_trl"
DDP, ZERO_SETTINGS = "test_ddp.py::test_numbers_of_plain_ddp", "test_zero.py::test_settings"
CLIP, SEQUENCE, ZOO = "blackbox/test_clip_and_seeds.py", "test_sequence.py", "test_zoo.py::test_proof"
EIGHT_BITS = "test_eight_bit_optimizers.py"
FSDP2, FSDP2_LOOP, FSDP2_SETTINGS = "test_fsdp2.py", "blackbox/test_fsdp2.py::test_loop", "test_fsdp2.py::test_settings"

COMBINATIONS: dict[str, tuple[str, str, str, str]] = {
    "Accelerate loop": (LOOP, LOOP, ZERO_LOOP, FSDP2_LOOP),
    "HF `Trainer`": (
        TRAINER,
        TRAINERS,
        "blackbox/test_zero_training.py::test_trainer",
        "blackbox/test_fsdp2.py::test_trainer",
    ),
    "TRL": (TRL, TRL, f"{TRL}_under_zero", f"{TRL}_under_fsdp2"),
    "accumulation, clipping": (LOOP, LOOP, "test_zero.py::test_fp32", f"{FSDP2}::test_accumulation"),
    "bf16": (
        f"{CLIP}::test_bf16_training",
        "blackbox/test_trainers.py::test_trainer_in_bf16",
        "test_zero.py::test_bf16",
        f"{FSDP2}::test_bf16",
    ),
    "activation checkpointing": (
        f"{CLIP}::test_recomputation_repeats_the_dropout",
        f"{CLIP}::test_recomputation_repeats_the_dropout",
        ZERO_SETTINGS,
        FSDP2_SETTINGS,
    ),
    "optimizer offloaded to the CPU": ("", "", "test_zero.py::test_offloaded", FSDP2_SETTINGS),
    "LoRA": ("test_lora.py::test_lora_on_every_linear", TRL, "test_zero.py::test_lora", f"{FSDP2}::test_lora"),
    "DoRA": (
        "test_dora.py::test_beside_plain_peft",
        DDP,
        "test_zero.py::test_other_adapters",
        "test_fsdp2.py::test_dora",
    ),
    "PEFT's other methods": (
        "test_peft_methods.py::test_beside_plain_peft",
        DDP,
        "test_zero.py::test_other_adapters",
        "test_fsdp2.py::test_other_adapters",
    ),
    "QLoRA": (
        "blackbox/test_qlora.py::test_script",
        "test_quantized_scripts.py::test_script",
        "blackbox/test_qlora.py::test_loop",
        "blackbox/test_qlora.py::test_loop",
    ),
    "pipeline stages": (
        "test_pipeline.py::test_two_stages_of_two",
        "blackbox/test_stages.py::test_trainer",
        "0–2 test_stages_zero.py::test_two_stages",
        "test_stages_fsdp2.py::test_two_stages",
    ),
    "dropout with the masks of one process": (
        "test_dropout_masks.py::test_a_model",
        f"{CLIP}::test_dropout_is_that_of_the_plain_run",
        "test_dropout_masks.py::test_zero_2",
        "test_dropout_masks.py::test_fsdp2",
    ),
    "prefix tuning": (
        "test_prompts.py::test_the_numbers_are_those_of_one_process",
        DDP,
        "test_zero.py::test_prefix",
        f"{FSDP2}::test_prefix",
    ),
    "Adafactor, Muon": (
        "test_whole_step.py::test_steps_with_whole_parameters",
        TRAINERS,
        "refused test_zero_launch.py::test_optimizers_that_need_whole_tensors",
        f"refused {FSDP2}::test_optimizers_that_need_whole_tensors",
    ),
    "8-bit optimizers": (
        f"{EIGHT_BITS}::test_where_blocks_are_whole_the_numbers_are",
        f"{EIGHT_BITS}::test_a_script_saves_and_goes_on",
        f"refused {EIGHT_BITS}::test_engines_that_cut_shards_once_more_refuse_them",
        f"refused {EIGHT_BITS}::test_engines_that_cut_shards_once_more_refuse_them",
    ),
    "sequence parallelism": (f"{SEQUENCE}::test_parity", DDP, ZERO_SETTINGS, FSDP2_SETTINGS),
    "whole experts": (ZOO, DDP, ZERO_SETTINGS, FSDP2_SETTINGS),
    "overlap, fused linears": ("test_columns.py::test_llama", DDP, "test_columns.py::test_zero", FSDP2_SETTINGS),
    "`torch.compile`": ("blackbox/test_compile.py::test_trainer_compiles", DDP, ZERO_SETTINGS, FSDP2_SETTINGS),
    "`save_pretrained`": (
        "blackbox/test_loop.py::test_saved_checkpoint_is_the_plain_one",
        "blackbox/test_loop.py::test_saved_checkpoint_is_the_plain_one",
        "blackbox/test_zero_training.py::test_saved_weights",
        FSDP2_LOOP,
    ),
    "exact resume": (
        "test_save_state.py::test_resumed_to_the_last_bit",
        "test_save_state.py::test_resumed_to_the_last_bit",
        "test_zero_checkpoints.py::test_resume",
        "blackbox/test_fsdp2.py::test_save_state_resumes_here_and_elsewhere",
    ),
    "resume at another tp × dp": (
        "blackbox/test_checkpoints.py::test_save_state_resumes_at_another_tp",
        "blackbox/test_checkpoints.py::test_trainer_resumes_at_another_tp",
        "test_zero_checkpoints.py::test_resume",
        "test_fsdp2_checkpoints.py::test_checkpoints_move_between_layouts",
    ),
    "`generate`": (
        "test_generate.py::test_all_modes",
        "blackbox/test_relatives.py::test_section",
        "test_zero.py::test_generate",
        f"{FSDP2}::test_generate",
    ),
}
"""Feature → its tests without replicas, under DDP, under ZeRO, under FSDP2."""


def missing() -> list[str]:
    """Tests that a cell names and that are not there."""
    named = {cell.rpartition(" ")[2] for row in COMBINATIONS.values() for cell in row if cell}
    return sorted(name for name in named if not _exists(*name.split("::")))


def _exists(file: str, test: str) -> bool:
    path = TESTS / file
    if not path.is_file():
        return False
    return any(
        isinstance(node, ast.FunctionDef) and node.name == test for node in ast.parse(path.read_text("utf-8")).body
    )


def table() -> str:
    """The docs' table."""
    lines = [f"| | {' | '.join(ENGINES)} |", f"|---|{'---|' * len(ENGINES)}"]
    for feature, row in COMBINATIONS.items():
        lines.append(f"| {feature} | {' | '.join(_cell(cell) for cell in row)} |")
    return "\n".join(lines)


def _cell(cell: str) -> str:
    if not cell:
        return "no such option"
    note, _, name = cell.rpartition(" ")
    return note if note == "refused" else f"[✓](../../tests/{name.split('::')[0]}) {note}".strip()


def written() -> str:
    """The table that the docs have."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()


def write() -> None:
    """Put the table into the docs."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")
