# Sourced by ci/test.sh and ci/quickstart.sh: makes the environment, leaves its programs first on PATH.
# TP_PLUGIN_VENV names another place for it than .venv. Quick when nothing changed since the last time.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${TP_PLUGIN_VENV:-$PWD/.venv}

if [ ! -x "$venv/bin/python" ]; then
    # A name on PATH need not work (pyenv leaves shims of versions that are not selected), so each is tried.
    base=
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "ci/setup.sh: needs Python 3.10 or newer with the venv module (Debian, Ubuntu: apt install python3-venv)" >&2
        exit 1
    fi
    "$base" -m venv "$venv"
fi
export PATH="$venv/bin:$PATH"

# The path is part of the stamp because an editable install points to one checkout.
stamp=$(python -c 'import hashlib, sys; print(hashlib.sha256(b"".join(
    [sys.argv[1].encode()] + [open(name, "rb").read() for name in sys.argv[2:]])).hexdigest())' \
    "$PWD" pyproject.toml constraints.txt)
if [ "$(cat "$venv/.tp-plugin-stamp" 2>/dev/null || true)" != "$stamp" ]; then
    echo "Installing into $venv (once, some minutes) ..."
    # torch first, with exactly this spec: left to the resolver, another build with gigabytes of CUDA may be chosen.
    python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
    python -m pip install --quiet -c constraints.txt -e '.[deepspeed,peft,trl,quant,dev]'
    echo "$stamp" >"$venv/.tp-plugin-stamp"
fi
