#!/usr/bin/env bash
# The main job: fine-tune a small Llama on one process and at tp_size 2, compare. Arguments go to examples/quickstart.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python examples/quickstart.py "$@"
