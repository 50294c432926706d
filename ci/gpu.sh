#!/usr/bin/env bash
# What only a card can show: numbers, waits, kernels, memory. Writes ci/bench/results/gpu.md; --rehearse runs it on CPU.
# TP_PLUGIN_PYTHON names a Python that has all there is to install already; else an environment is made.
set -euo pipefail
if [ -n "${TP_PLUGIN_PYTHON:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    exec "$TP_PLUGIN_PYTHON" ci/bench/gpu.py "$@"
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python ci/bench/gpu.py "$@"
