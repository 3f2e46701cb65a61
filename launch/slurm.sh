#!/usr/bin/env bash
# Trains on a SLURM cluster with GPUs, one task a GPU; requeues itself when it is preempted.
#SBATCH --job-name=uae_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: sbatch [--nodes=N ...] launch/slurm.sh [--dry-run] CONFIG WORKDIR [--config.x.y=value ...]

  sbatch --nodes=2 launch/slurm.sh configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium /shared/run --config.model.folder=/weights/UAE

Expects .venv with `pip install '.[cuda]'` in the folder where sbatch is called. Two minutes before the time limit, or at a
preemption, the run saves and the job is queued again.
TEXT
}

dry_run=false
case "${1:-}" in
  -h | --help | "") usage; exit 0 ;;
  --dry-run) dry_run=true; shift ;;
esac
if [ $# -lt 2 ]; then usage >&2; exit 2; fi
config=$1 workdir=$2
shift 2

do_it() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

code=0
do_it srun --kill-on-bad-exit=1 .venv/bin/python -m uae_jax.main --config="$config" --workdir="$workdir" "$@" || code=$?
if [ "$code" -eq 143 ]; then
  do_it scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
