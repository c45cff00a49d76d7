#!/usr/bin/env bash
# Checks the style, the layers and the tests, in .venv (made if absent).
#
#   ./scripts/test.sh                          quick tests
#   PYTEST_MARKERS=all ./scripts/test.sh       slow ones too
#   ./scripts/test.sh tests/test_configs.py    arguments go to pytest
#   PYTEST_WORKERS=4 ./scripts/test.sh         so many files at a time; by default 2,
#                                              of about 5 GB of memory each
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment .venv installed-test.py '.[test,demo]'

PYTEST_MARKERS="${PYTEST_MARKERS:-not slow}"
if [ "$PYTEST_MARKERS" = all ]; then
  PYTEST_MARKERS='slow or not slow'
fi

.venv/bin/ruff check .
.venv/bin/lint-imports
exec .venv/bin/python -m pytest -m "$PYTEST_MARKERS" \
  -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
