#!/usr/bin/env bash
# Compares importers with libraries that do not install beside the torch that kvx needs: their modules run on it, if
# their requirements are left aside. In an environment of its own, .venv-oracles, over that of `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-oracles
if [[ ! -e $environment/.installed ]]; then
    .venv/bin/python -m venv "$environment"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "import site; site.addsitedir('$base')" >"$own/kvx-base.pth"
    "$environment/bin/pip" install --quiet --no-deps eole==0.6.0 pyonmttok==1.38.1 configargparse six rapidfuzz \
        pyahocorasick pydantic pydantic-core annotated-types typing-inspection typing-extensions
    touch "$environment/.installed"
fi
"$environment/bin/python" -m pytest tests/models/importers/test_opennmt.py "$@"
