#!/usr/bin/env bash
# Format, lint, types, tests; arguments go to pytest: bash ci/test.sh tests/policy -k vocab
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff format --check .
ruff check .
mypy
if python -c 'import mkdocs' 2>/dev/null; then
    mkdocs build --strict --quiet --site-dir out/site
else
    echo "ci/test.sh: mkdocs is not installed (pip install '.[docs]'); the site is not built" >&2
fi
# tests/blackbox/hosts.py makes two machines of one, as root.
if [ -n "${CI:-}" ] && ! command -v ip >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends iproute2; } >/dev/null ||
        echo "ci/test.sh: no iproute2; the tests of two machines are skipped" >&2
fi
# One thread per process: tests start several ranks, and the numbers must not depend on the machine's cores.
export OMP_NUM_THREADS=1
# What another environment's compiler has built for this user may not load here.
export TORCHINDUCTOR_CACHE_DIR="$PWD/out/inductor"
# Two at a time, each file by one: most tests start ranks that wait for each other, and leave a core idle.
exec python -m pytest -q -n 2 --dist loadfile "$@"
