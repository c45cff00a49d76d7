#!/usr/bin/env bash
# Puts T5X beside an installed prompt_tuning: T5X, airio and jestimator at the
# commits that were tried, without their own requirements, which contradict each
# other, and the packages of PyPI that they import beyond ours. Nothing that is
# installed already changes; t5 is not needed and not installed.
#
#   ./scripts/install_t5x.sh [VENV]            default: .venv; may be repeated
#   T5X_SOURCES=FOLDER ./scripts/install_t5x.sh [VENV]
#                 takes the clones FOLDER/t5x, FOLDER/airio, FOLDER/jestimator
set -euo pipefail
# jestimator for its optimizer Amos, which T5X imports.
commits=(
  google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16
  google/airio@69897df7d9a427b947a9f7bb4164c7782b43e601
  google-research/jestimator@326824a477feef6d92e6f44175000907a72899ca
)
packages=(
  grain==0.2.18
  portpicker==1.6.0
  cached_property==2.0.1
  tensorboard==2.21.0
  fiddle==0.3.1
)

venv="${1:-$(cd "$(dirname "$0")/.." && pwd)/.venv}"
python="$venv/bin/python"
fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}
[ -x "$python" ] || fail "no virtual environment in $venv; make one and install\
 prompt_tuning in it (./scripts/test.sh does), or name another one"
"$python" -c 'import prompt_tuning, seqio' 2>/dev/null ||
  fail "prompt_tuning is not installed in $venv: $python -m pip install '.[demo]'"

# What is there is a constraint of what comes: jax, flax, seqio and tfds stay.
versions="$(mktemp)"
trap 'rm -f "$versions"' EXIT
freeze() { "$python" -m pip list --format=freeze 2>/dev/null; }
before="$(freeze)"
grep -viE '^(t5x|airio|jestimator|prompt_tuning)==' <<<"$before" >"$versions"

install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
install --constraint "$versions" "${packages[@]}"
for entry in "${commits[@]}"; do
  commit="${entry#*@}" repository="${entry%@*}"
  name="$(basename "$repository")"
  if [ -z "${T5X_SOURCES:-}" ]; then
    install --no-deps "git+https://github.com/$repository@$commit"
    continue
  fi
  clone="$(cd "$T5X_SOURCES" && pwd)/$name"
  [ -d "$clone" ] || fail "T5X_SOURCES=$T5X_SOURCES has no clone $name"
  found="$(git -C "$clone" rev-parse HEAD 2>/dev/null || echo unknown)"
  [ "$found" = "$commit" ] ||
    echo "Note: $clone is at $found, tried was $commit" >&2
  install --no-deps "$clone"
done

echo "New in $venv:"
comm -13 <(sort <<<"$before") <(freeze | sort) | sed 's/^/  /'
# Its mains parse flags with fiddle, which importing t5x.train alone does not.
"$python" -c '
import t5x.train, t5x.eval, t5x.infer, t5x.config_utils, fiddle
import flax, jax, seqio
print("T5X imports, with jax", jax.__version__, "and flax", flax.__version__)
' 2>/dev/null || fail "T5X does not import: $python -c 'import t5x.train'"
