#!/usr/bin/env bash
# Runs the tests of the runtime on another Python, in an environment of its own without torch:
#     scripts/test_runtime.sh PYTHON BUNDLES
# BUNDLES is the folder that `make bundles` fills.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 bundles=$2
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=.venv-$version
if [[ ! $venv/.installed -nt pyproject.toml || ! $venv/.installed -nt constraints.txt ]]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --constraint constraints.txt --editable '.[gpu,evaluate,serve,test]'
    touch "$venv/.installed"
fi
echo "runtime tests on Python $version, without torch"
KVX_TEST_BUNDLES=$bundles "$venv/bin/pytest" -n auto --dist loadfile -rs tests/runtime
