#!/usr/bin/env bash
# Checks the style, the layers and the tests, in .venv (made if absent).
#
#   ./scripts/test.sh                          quick tests
#   PYTEST_MARKERS=all ./scripts/test.sh       slow ones too
#   ./scripts/test.sh tests/test_configs.py    arguments go to pytest
#   PYTEST_WORKERS=4 ./scripts/test.sh         so many files at a time, of about 5 GB
#                                              of memory each; by default 2, or 1
#                                              where less than 12 GB are free
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment .venv installed-test.py '.[test,demo]'

PYTEST_MARKERS="${PYTEST_MARKERS:-not slow}"
if [ "$PYTEST_MARKERS" = all ]; then
  PYTEST_MARKERS='slow or not slow'
fi
FREE_KB="$(awk '/^MemAvailable/ {print $2}' /proc/meminfo 2> /dev/null || true)"
WORKERS=2
[ "${FREE_KB:-12000000}" -ge 12000000 ] || WORKERS=1

.venv/bin/ruff check .
.venv/bin/lint-imports
exec .venv/bin/python -m pytest -m "$PYTEST_MARKERS" \
  -n "${PYTEST_WORKERS:-$WORKERS}" --dist loadfile "$@"
