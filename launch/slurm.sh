#!/usr/bin/env bash
# Trains on a SLURM cluster with GPUs; requeues itself when it is preempted or its time is over.
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
Usage: sbatch [--nodes=N ...] launch/slurm.sh [options] CONFIG WORKDIR [--config.x.y=value ...]

  sbatch --nodes=2 launch/slurm.sh configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium /shared/run \
      --config.model.folder=/weights/UAE --config.data.folder=/data/longcap
  sbatch --nodes=2 --ntasks-per-node=1 --cpus-per-task=64 launch/slurm.sh --task-per node configs/unified_grpo.py /shared/run

Expects .venv with `pip install '.[cuda]'` in the folder where sbatch is called, and WORKDIR on a file system that all nodes share.
Every node is checked first (driver, cards, shared memory), and flags of XLA and NCCL are set; those of the environment win.
Two minutes before the time limit, or at a preemption, the run saves and the job is queued again; it then goes on. So it is after
failures of nodes and network. An error of the run's user ends the job.

Options:
  --task-per gpu|node   one task a GPU (default), or one a node that uses all of its GPUs
  --python PATH         an interpreter that has uae_jax, instead of .venv
  --max-restarts N      how often the job may queue itself again (default 100)
  --retries N           how often in a row without progress (default 5)
  --dry-run             print the commands and do nothing; works without sbatch
  --help                this text
TEXT
}

# sbatch runs a copy of this script from its spool folder
folder=${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}
cd "$folder"
# shellcheck source=launch/options.sh
. launch/options.sh
# shellcheck source=launch/supervise.sh
. launch/supervise.sh
read_options "task-per python max-restarts retries" "" 2 "$@"
retries=${option[retries]:-$retries}
per=${option[task-per]:-gpu} python=${option[python]:-.venv/bin/python}

tasks=()
case $per in
  gpu) ;;
  node)
    # jax gives a task the one GPU of its local rank unless it is told which are its own
    gpus=${SLURM_GPUS_ON_NODE:-8}
    tasks=(env JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))")
    ;;
  *) fail "--task-per is $per; choose gpu or node" ;;
esac
step=(srun --kill-on-bad-exit=1)
# srun of SLURM 22.05 and later does not take it from sbatch, and a task would have one core
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
if [ "$per" = node ]; then step+=(--ntasks-per-node=1 --ntasks="${SLURM_NNODES:-1}"); fi

step+=("${tasks[@]}" bash launch/on_cards.sh "$python" -m uae_jax.main --config="${positional[0]}"
  --workdir="${positional[1]}" "${positional[@]:2}")
if $dry_run; then
  do_it "${step[@]}"
  exit
fi

# first_failure FILE CODE: the code of the task that srun names first. It ends the others for that one, and answers with the
# highest code of all, which may be that of a task that it has ended.
first_failure() {
  local line
  line=$(grep -m 1 -E '^srun: error: [^ ]+: tasks? [0-9,-]+: ' "$1" || true)
  case $line in
    *'Exited with exit code '*) echo "${line##* }" ;;
    *': Killed'* | *': Out Of Memory'*) echo 137 ;;
    *': Terminated'*) echo 143 ;;
    *': Segmentation fault'*) echo 139 ;;
    *': Bus error'*) echo 135 ;;
    *': Aborted'*) echo 134 ;;
    *) echo "$2" ;;
  esac
}

workdir=${positional[1]} job=${SLURM_JOB_ID:-0}
counts=slurm-$job.restarts # beside the log of the job, over its starts
export UAE_RUN=slurm-$job
said=$(mktemp) code=0
# nothing of a job outlives it: the lock that a killed task has left must not stop the next job
lock=$workdir/run.lock
trap 'rm -f "$said"; if grep -q "\"run\": \"$UAE_RUN\"" "$lock" 2>/dev/null; then rm -f "$lock"; fi' EXIT
begin "$workdir" "$counts"
run_logged "$said" "${step[@]}" || code=$?
code=$(first_failure "$said" "$code")
if [ "$(verdict "$code" "$said")" != again ]; then
  rm -f "$counts"
  exit "$code"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${option[max-restarts]:-100}" ]; then
  say "the job has been queued again ${SLURM_RESTART_COUNT:-0} times; the same sbatch continues the run (--max-restarts)"
  exit "$code"
fi
may_start_again "$workdir" "$counts" || exit "$GIVEN_UP"
say "the run ended ($(meaning "$code")); the job is queued again, and goes on from the newest checkpoint"
for turn in 1 2 3; do
  if scontrol requeue "$job"; then exit 0; fi
  nap "$first_wait"
done
say "scontrol requeue $job failed $turn times; the same sbatch continues the run"
exit "$code"
