# Sourced by the launchers that run commands elsewhere: DRY_RUN is set by --dry_run,
# `arguments` holds all others, quoted for one more shell.
DRY_RUN=
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry_run ]; then
    DRY_RUN=1
  else
    arguments+=("$(printf '%q' "$argument")")
  fi
done
