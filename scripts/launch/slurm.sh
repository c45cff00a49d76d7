#!/usr/bin/env bash
# Trains as a Slurm job, a process for each GPU; JAX finds its peers by Slurm.
#
#   NODES=2 GPUS=8 ./scripts/launch/slurm.sh --gin_file=models/t5_1_1_xl.gin ...
#
# Arguments are those of `prompt-tuning train`; --dry_run prints the job's script.
# The job saves before its time ends, and is queued again until it is done; so it
# is after a node was lost. Settings:
#   NODES, GPUS  nodes, and GPUS of each                       [1, 1]
#   TIME         of one allocation                             [24:00:00]
#   COMMAND      how to call the package there                 [prompt-tuning]
#   SBATCH       further options of sbatch: "--partition=a100 --account=x"
set -euo pipefail
NODES="${NODES:-1}"
GPUS="${GPUS:-1}"
TIME="${TIME:-24:00:00}"
COMMAND="${COMMAND:-prompt-tuning}"

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
again=
trap 'again=1; kill -TERM \$!' USR1
# One process that is lost ends the step; the others would wait for it.
srun --kill-on-bad-exit=1 $COMMAND train ${arguments[*]} &
wait \$!; code=\$?
if [ -n "\$again" ]; then wait; code=75; fi
if [ "\$code" -ge 75 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$code"
SCRIPT
