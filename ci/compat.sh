#!/usr/bin/env bash
# The short form of the tests with the oldest and the newest supported versions, each in an environment of its own.
# Prints a table. Arguments go to ci/compat.py: bash ci/compat.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=1
export TEST_TIMEOUT=200 # it may run beside other work
exec python ci/compat.py "$@"
