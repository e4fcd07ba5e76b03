#!/usr/bin/env bash
# Tests what runs on Ray, which is larger than all else that the tests need, on clusters of this machine. In an environment
# of its own, .venv-ray, over that of `make setup`. It takes the bundles of `make test`, or exports them.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-ray
if [[ ! $environment/.installed -nt pyproject.toml ]]; then
    .venv/bin/python -m venv --clear "$environment"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "import site; site.addsitedir('$base')" >"$own/kvx-base.pth"
    "$environment/bin/pip" install --quiet --constraint constraints.txt 'ray[data,serve]>=2.60,<3'
    touch "$environment/.installed"
fi
if [[ -e build/test-bundles/.exported ]]; then
    export KVX_TEST_BUNDLES=build/test-bundles
fi
"$environment/bin/python" -m pytest tests/runtime/scale/test_on_ray.py tests/runtime/serving/test_ray_{app,nodes}.py "$@"
