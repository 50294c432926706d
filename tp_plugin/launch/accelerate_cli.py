"""In the ``accelerate launch`` process: make the keys legal, check them before anything starts, tell the workers.

Patched: ``BaseConfig.process_config`` (takes our keys out of the file's mapping), ``launch_command_parser``
(``--tp_size``) and ``_validate_launch_command`` (checks; CPU runs really start their processes).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from tp_plugin.config.run_config import DISABLE, TP_SIZE, Options, from_deepspeed
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import TPError
from tp_plugin.launch.deepspeed_config import file_in, mentions_key, read
from tp_plugin.launch.imports import after_import
from tp_plugin.policy.registry import load

_written: dict[str, Any] = {}
"""Our keys as the config file holds them."""


def register(argv: list[str]) -> None:
    """Register the import hooks if the command line, the config file or the environment holds the key."""
    asked = any(arg.split("=")[0].replace("-", "_") == "__tp_size" for arg in argv)
    files = [_config_file(argv), _value_of(argv, "__config")]  # the second is `trl`'s: what it does not know, we may
    if asked or os.environ.get(TP_SIZE) or mentions_key(file_in(argv)) or any(_mentions_key(f) for f in files if f):
        after_import("accelerate.commands.config.config_args", _patch_config)
        after_import("accelerate.commands.launch", _patch_launch)


def _value_of(argv: list[str], *options: str) -> Path | None:
    for at, arg in enumerate(argv):
        name, _, value = arg.partition("=")
        if name.replace("-", "_") in options:
            return Path(value or (argv[at + 1] if at + 1 < len(argv) else ""))
    return None


def _config_file(argv: list[str]) -> Path:
    named = _value_of(argv, "__config_file", "__accelerate_config")
    if named is not None:
        return named
    cache = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "huggingface"
    )
    return Path(cache) / "accelerate" / "default_config.yaml"


def _mentions_key(config: Path) -> bool:
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # Accelerate says what is wrong with the file
    named = dict(re.findall(r"(deepspeed_config_file|accelerate_config)[\"']?\s*:\s*[\"']?([^\"'\s,}]+)", text))
    if "tp_size" in text or mentions_key(named.get("deepspeed_config_file")):
        return True
    return "accelerate_config" in named and _mentions_key(Path(named["accelerate_config"]))


def _patch_config(config_args: Any) -> None:
    original = config_args.BaseConfig.process_config

    def process_config(config: dict[str, Any]) -> Any:
        for key in ("tp_size", "tp_plugin"):
            if key in config:
                _written[key] = config.pop(key)
        for key, value in config.items():
            if isinstance(value, dict):
                _refuse_nested(key, value)
        return original(config)

    patch(config_args.BaseConfig, "process_config", staticmethod(process_config))


def _refuse_nested(section: str, values: dict[str, Any]) -> None:
    if "tp_size" in values:
        _exit(
            f"`{section}.tp_size: {values['tp_size']}` has no effect there (Accelerate ignores it); move it to the "
            f"top level of the config file: `tp_size: {values['tp_size']}`"
        )
    theirs = values.get("parallelism_config_tp_size")
    if theirs not in (None, 1) and "tp_size" in _written:
        _exit(
            f"both `tp_size: {_written['tp_size']}` and `{section}.parallelism_config_tp_size: {theirs}` are set, two "
            "different tensor parallelisms; keep the top-level `tp_size` and remove the other"
        )


def _patch_launch(launch: Any) -> None:
    wrap(launch, "launch_command_parser", _launch_command_parser)
    wrap(launch, "_validate_launch_command", _validate_launch_command)


def _launch_command_parser(original: Any, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = original(*args, **kwargs)
    parser.add_argument("--tp_size", default=None, help="tp_plugin: ranks per tensor-parallel group.")
    return parser


def _validate_launch_command(original: Any, args: Any) -> Any:
    result = original(args)
    if os.environ.get(DISABLE, "") not in ("", "0"):
        return result
    try:
        options = options_of(args)
        if options.tp_size > 1:
            _check(options, result[0])
            _start_cpu_processes(result[0])
    except TPError as error:
        _exit(str(error))
    os.environ.update(options.to_environment())
    return result


def options_of(args: Any) -> Options:
    """The options from the command line, else the config file, else its DeepSpeed config, else the environment."""
    inner = from_deepspeed(_deepspeed_config(args), f"{getattr(args, 'deepspeed_config_file', None)}")
    size = args.tp_size if args.tp_size is not None else _written.get("tp_size")
    if inner is None:
        return Options.parse(size if size is not None else os.environ.get(TP_SIZE) or 1, _written.get("tp_plugin"))
    outer = Options.parse(inner.tp_size if size is None else size, _written.get("tp_plugin"))
    if outer.tp_size != inner.tp_size:
        raise TPError(
            f"tp_size is {outer.tp_size} in the Accelerate config (or command line), but {inner.tp_size} in "
            f"{args.deepspeed_config_file}; write it in one place"
        )
    return outer if "tp_plugin" in _written else inner


def _deepspeed_config(args: Any) -> dict[str, Any] | None:
    return read(args.deepspeed_config_file) if getattr(args, "deepspeed_config_file", None) else None


def _check(options: Options, args: Any) -> None:
    if options.policy:
        load(options.policy)
    processes = args.num_processes or 1
    if processes % options.tp_size:
        raise TPError(
            f"tp_size: {options.tp_size} does not divide num_processes: {processes}; num_processes is the whole world, "
            f"tp_size x data-parallel size: write for example num_processes: {options.tp_size} or "
            f"{2 * options.tp_size}"
        )
    if getattr(args, "parallelism_config_tp_size", 1) not in (None, 1):
        raise TPError("`--tp_size` and `--parallelism_config_tp_size` are both set; keep `--tp_size`")
    if getattr(args, "use_megatron_lm", False):
        raise TPError(
            f"tp_size: {options.tp_size} together with Megatron-LM is not supported by this version; write "
            "distributed_type: MULTI_GPU, MULTI_CPU, FSDP or DEEPSPEED, or remove tp_size"
        )
    if getattr(args, "use_fsdp", False):
        from tp_plugin.engines.fsdp2.config import refuse as refuse_fsdp

        refuse_fsdp(vars(args), options.tp_size)
    config = _deepspeed_config(args)
    if config is not None:
        from tp_plugin.engines.deepspeed.config import refuse

        refuse(config, options.tp_size)


def _start_cpu_processes(args: Any) -> None:
    """Accelerate starts one process for MULTI_CPU; and with ``use_cpu`` its workers do not see each other."""
    if args.use_fsdp and (args.cpu or args.use_cpu):
        # Accelerate would switch FSDP off; the workers find no GPU, and take gloo
        os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="false")
        args.cpu = args.use_cpu = False
        args.gpu_ids = "all"
        return
    if args.use_deepspeed:
        if args.cpu or args.use_cpu:
            # Accelerate would switch DeepSpeed off; its own way to say CPU, with gloo, is this
            os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="false")
            args.cpu = args.use_cpu = False
            args.gpu_ids = "all"
        return
    if args.cpu or args.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if getattr(args, "mpirun_hostfile", None) is None and (args.num_processes or 1) > 1:
        args.cpu = False
        args.multi_gpu = True


def _exit(message: str) -> None:
    sys.exit(f"tp_plugin: {message}.")
