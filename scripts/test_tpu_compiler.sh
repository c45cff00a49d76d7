#!/usr/bin/env bash
# Compiles T5 small and XXL for TPUs that are not here, in .venv-tpu (made if
# absent): JAX looks for a TPU wherever libtpu is installed, which the other tests
# can do without.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment .venv-tpu installed-tpu.py '.[tpu]' pytest beartype

exec .venv-tpu/bin/python -m pytest tests/planning/test_compilation.py "$@"
