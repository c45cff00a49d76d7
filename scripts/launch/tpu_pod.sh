#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it if it is not there, installs this clone on
# every worker, runs the same command on all, and starts over after a preemption.
#
#   TPU=my-slice ZONE=us-central2-b TYPE=v4-32 ./scripts/launch/tpu_pod.sh \
#     models/t5_1_1_xxl runs/prompt_tune ... MODEL_DIR=gs://bucket/run
#
# Arguments are those of `prompt-tuning train`; --dry_run prints the commands.
# MODEL_DIR must be gs://. Nothing is deleted but a slice that was preempted.
#   TPU, ZONE, TYPE  name, zone and accelerator type of the slice
#   VERSION          TPU software version       [tpu-ubuntu2204-base]
#   SPOT             1 asks for a spot slice
#   RESTARTS         after a lost slice or worker [20]
#   EXTRA            pip extra to install       [tpu]
set -euo pipefail
: "${TPU:?names the slice}" "${ZONE:?is its zone}" "${TYPE:?such as v4-32}"
VERSION="${VERSION:-tpu-ubuntu2204-base}"
RESTARTS="${RESTARTS:-20}"
PAUSE="${PAUSE:-30}"
cd "$(dirname "$0")/../.."

source scripts/launch_arguments.sh

run() { # a command, printed instead of run by --dry_run
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
on_all() { tpu ssh --worker=all --command="$1"; }
state() {
  gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" \
    --format='value(state)' 2> /dev/null || true
}

make() { # the slice, if it is not there
  local now
  while true; do
    now="$([ -n "$DRY_RUN" ] || state)"
    case "$now" in
      READY) return ;;
      '') break ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED) tpu delete --quiet && break ;;
      *) echo "tpu_pod.sh: waiting, the slice is $now" >&2; sleep "$PAUSE" ;;
    esac
  done
  tpu create --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}
}

install() {
  local wheels code=0
  wheels="$(mktemp -d)"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir="$wheels" . &&
    run gcloud compute tpus tpu-vm scp "$wheels"/*.whl "$TPU:" --zone="$ZONE" \
      --worker=all &&
    on_all "python3 -m pip install --quiet --user uv &&
      ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 ~/venv &&
      ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python \
        \"\$(ls -t ~/prompt_tuning-*.whl | head -n 1)[${EXTRA:-tpu}]\"" || code=$?
  rm -rf "$wheels"
  return "$code"
}

train() {
  # What gcloud itself ends with says little of several workers.
  local command="~/venv/bin/prompt-tuning train ${arguments[*]}; code=\$?"
  on_all "$command; echo \$code > ~/exit_code; exit \$code"
}
is_users_fault() { # some worker ended with 1 or 2
  [ "$(state)" = READY ] && on_all 'cat ~/exit_code' | grep -qx '[12]'
}

for ((attempt = 0; ; attempt++)); do
  code=0
  trained=
  { make && install && trained=1 && train; } || code=$?
  if [ "$code" -eq 0 ] || [ "$attempt" -ge "$RESTARTS" ] ||
    { [ -n "$trained" ] && is_users_fault; }; then
    exit "$code"
  fi
  echo "tpu_pod.sh: exit code $code; restart $((attempt + 1)) of $RESTARTS" >&2
  sleep "$PAUSE"
done
