#!/usr/bin/env bash
# Checks the style, the layers and the tests, in .venv (made if absent).
#
#   ./scripts/test.sh                          quick tests
#   PYTEST_MARKERS=all ./scripts/test.sh       slow ones too
#   ./scripts/test.sh tests/test_configs.py    arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "test.sh: Python 3.11 or later is required, $PYTHON is" \
    "$("$PYTHON" --version 2>&1); name another with PYTHON=..." >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv
fi
# The stamp holds what was installed: an unchanged setup.py installs nothing.
STAMP=.venv/installed-setup.py
if ! cmp -s setup.py "$STAMP"; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable '.[test,demo]'
  cp setup.py "$STAMP"
fi

PYTEST_MARKERS="${PYTEST_MARKERS:-not slow}"
if [ "$PYTEST_MARKERS" = all ]; then
  PYTEST_MARKERS='slow or not slow'
fi

.venv/bin/ruff check .
.venv/bin/lint-imports
exec .venv/bin/python -m pytest -m "$PYTEST_MARKERS" "$@"
