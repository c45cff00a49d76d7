#!/usr/bin/env bash
# Trains on several machines over plain ssh: the same command on each.
#
#   HOSTS="a b c" ./scripts/launch/ssh.sh models/t5_1_1_xl runs/prompt_tune ...
#
# Arguments are those of `prompt-tuning train`; --dry_run prints what would run.
# MODEL_DIR must be a folder that all hosts share, or gs://. The package is
# installed on each host already; settings:
#   HOSTS     machines, the first of which the others connect to
#   COMMAND   how to call the package there     [prompt-tuning]
#   FOLDER    where to call it                  [.]
#   PORT      free on the first machine         [8476]
#   RESTARTS  after a machine or process is lost (exit code 75 or a signal) [10]
set -euo pipefail
: "${HOSTS:?names the machines: HOSTS=\"a b\"}"
COMMAND="${COMMAND:-prompt-tuning}"
FOLDER="${FOLDER:-.}"
PORT="${PORT:-8476}"
RESTARTS="${RESTARTS:-10}"
read -ra hosts <<< "$HOSTS"

source "$(dirname "$0")/../launch_arguments.sh"

remote() { # what host number $1 runs
  echo "cd $FOLDER && $COMMAND train ${arguments[*]}" \
    "--coordinator_address=${hosts[0]#*@}:$PORT" \
    "--num_processes=${#hosts[@]} --process_id=$1"
}

if [ -n "$DRY_RUN" ]; then
  for i in "${!hosts[@]}"; do
    echo "ssh ${hosts[$i]} $(printf '%q' "$(remote "$i")")"
  done
  exit 0
fi

for ((attempt = 0; ; attempt++)); do
  processes=()
  for i in "${!hosts[@]}"; do
    # A terminal there, so that what runs ends with this connection; a host
    # that says nothing for a minute is lost.
    ssh -tt -o ServerAliveInterval=15 -o ServerAliveCountMax=4 \
      "${hosts[$i]}" "$(remote "$i")" < /dev/null &
    processes+=($!)
  done
  trap 'kill "${processes[@]}" 2> /dev/null || true' EXIT
  trap 'exit 130' INT TERM
  worst=0
  for process in "${processes[@]}"; do
    code=0
    wait "$process" || code=$?
    # A fault of the user's on one host makes the others lose that host.
    if [ "$worst" -eq 0 ] || { [ "$code" -gt 0 ] && [ "$code" -lt 75 ]; }; then
      worst=$code
    fi
  done
  case "$worst" in # done, the user's fault, or no such command there
    0 | [1-9] | [1-6][0-9] | 7[0-4] | 126 | 127) exit "$worst" ;;
  esac
  [ "$attempt" -lt "$RESTARTS" ] || exit "$worst"
  echo "ssh.sh: a host or process was lost ($worst); restart" \
    "$((attempt + 1)) of $RESTARTS" >&2
  sleep "${PAUSE:-30}"
done
