#!/usr/bin/env bash
# Compares importers with libraries that do not install beside what kvx needs: their modules run on it, if their
# requirements are left aside. In an environment of its own, .venv-oracles, over that of `make setup`. fairseq is built
# from source, with a compiler, in some minutes.
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
    "$environment/bin/pip" install --quiet --no-deps wheel cython omegaconf==2.3.0 hydra-core==1.3.2 \
        antlr4-python3-runtime==4.9.3 bitarray scipy scikit-learn joblib threadpoolctl cloudpickle narwhals
    "$environment/bin/pip" install --quiet --no-deps --no-build-isolation fairseq-fixed==0.12.3.1
    touch "$environment/.installed"
fi
"$environment/bin/python" -m pytest tests/models/importers/test_opennmt.py tests/models/importers/test_fairseq.py \
    -k itself "$@"
