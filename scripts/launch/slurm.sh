#!/usr/bin/env bash
# Trains as a Slurm job, a process for each GPU; JAX finds its peers by Slurm.
#
#   NODES=2 GPUS=8 ./scripts/launch/slurm.sh models/t5_1_1_xl runs/prompt_tune ...
#
# Arguments are those of `prompt-tuning train`; --dry_run prints the job's script.
# The job saves before its time ends, and is queued again until it is done; so it
# is after a node was lost, but not for a fault of the user's. Settings:
#   NODES, GPUS  nodes, and GPUS of each                       [1, 1]
#   TIME         of one allocation                             [24:00:00]
#   COMMAND      how to call the package there                 [prompt-tuning]
#   RESTARTS     times that it is queued again                 [50]
#   SBATCH       further options of sbatch: "--partition=a100 --account=x"
set -euo pipefail
NODES="${NODES:-1}"
GPUS="${GPUS:-1}"
TIME="${TIME:-24:00:00}"
COMMAND="${COMMAND:-prompt-tuning}"
RESTARTS="${RESTARTS:-50}"

submit=(sbatch ${SBATCH:-})
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry_run ]; then
    submit=(cat)
  else
    arguments+=("$(printf '%q' "$argument")")
  fi
done

"${submit[@]}" << SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=prompt_tuning
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --time=$TIME
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# srun itself would kill the processes; they are told to save, and end with 75.
trap 'scancel --signal=TERM "\$SLURM_JOB_ID"' USR1
fault="\${TMPDIR:-/tmp}/prompt_tuning_fault_\$SLURM_JOB_ID"
[ -z "\${SLURM_SUBMIT_DIR:-}" ] || fault="\$SLURM_SUBMIT_DIR/.fault_\$SLURM_JOB_ID"
# One process that is lost ends the step: the others would wait for it. Then srun
# reports the kill, so a process with a fault of the user's leaves a file.
srun --kill-on-bad-exit=1 bash -c '"\${@:2}"; code=\$?
  if [ \$code -gt 0 ] && [ \$code -lt 75 ]; then touch "\$1"; fi; exit \$code' \
  bash "\$fault" $COMMAND train ${arguments[*]} &
step=\$!
wait \$step; code=\$?
while kill -0 \$step 2> /dev/null; do wait \$step; code=\$?; done
if [ -e "\$fault" ]; then rm "\$fault"; exit "\$code"; fi
if [ "\$code" -ge 75 ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt $RESTARTS ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SCRIPT
