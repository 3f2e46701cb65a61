#!/usr/bin/env bash
# Trains on this machine, in one process or several, and starts again after failures of the machine until the run is finished.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [options] CONFIG WORKDIR [--config.x.y=value ...]

  launch/local.sh configs/unified_grpo.py runs/tiny
  launch/local.sh --processes 8 configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium /data/run \
      --config.model.folder=/weights/UAE --config.data.folder=/data/longcap

Makes .venv with the jax build of this machine (CUDA where nvidia-smi works) on the first run. One process uses all devices;
several are for tests of multi-process runs, and for hosts where one process a GPU is faster. The same command continues a run.
A run that was killed or preempted is started again; one that ends with an error of its user, or by Ctrl-C, is not.
On GPUs the host is checked first (driver, cards, shared memory), and flags of XLA and NCCL are set; those of the environment win.

Options:
  --processes N   so many processes over jax.distributed, each with its own GPU where there are GPUs (default 1)
  --port PORT     where process 0 listens for the others (default 12355)
  --retries N     how often in a row it is started again without progress (default 5)
  --python PATH   an interpreter that has uae_jax, instead of .venv
  --dry-run       print the commands and do nothing
  --help          this text
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
. launch/options.sh
# shellcheck source=launch/gpu.sh
. launch/gpu.sh
# shellcheck source=launch/supervise.sh
. launch/supervise.sh
read_options "processes port python retries" "" 2 "$@"
retries=${option[retries]:-$retries}
processes=${option[processes]:-1} port=${option[port]:-12355} python=${option[python]:-.venv/bin/python}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then fail "--processes is $processes; it must be a positive number"; fi
if ! [[ $port =~ ^[0-9]+$ ]]; then fail "--port is $port; it must be a number"; fi
main=("$python" -m uae_jax.main --config="${positional[0]}" --workdir="${positional[1]}" "${positional[@]:2}")

gpus=false
if command -v nvidia-smi >/dev/null 2>&1; then
  if nvidia-smi >/dev/null 2>&1; then gpus=true; else caution "nvidia-smi fails, so the run is on the CPU; run it to see why"; fi
fi
extra=$($gpus && echo '.[cuda]' || echo .)
if ! cards_wanted; then gpus=false; fi
if $gpus; then
  if ! $dry_run; then gpu_checks "$processes" 1; fi
  gpu_flags
  if $dry_run; then show_flags; fi
fi
if [ -z "${option[python]:-}" ] && [ ! -x .venv/bin/python ]; then
  do_it python3 -m venv .venv
  do_it .venv/bin/pip install -q "$extra"
fi

# Runs all processes to their end; the code is that of the first that failed.
run_all() {
  local index code=0 first=0 pid died
  running=()
  for ((index = 0; index < processes; index++)); do
    local command=("${main[@]}" --coordinator="localhost:$port" --processes="$processes" --process_id="$index")
    if $gpus; then command=(env JAX_LOCAL_DEVICE_IDS="$index" "${command[@]}"); fi
    if $dry_run; then
      do_it "${command[@]}"
    else
      "${command[@]}" &
      running+=("$!")
    fi
  done
  while [ ${#running[@]} -gt 0 ]; do
    code=0 died=""
    wait -n -p died "${running[@]}" 2>/dev/null || code=$?
    # none is named where a signal arrived, and where bash has told the end of a killed process already
    for pid in "${running[@]}"; do
      if [ -z "${died:-}" ] && ! kill -0 "$pid" 2>/dev/null; then
        died=$pid code=0
        wait_for "$pid" || code=$?
      fi
    done
    if [ -z "${died:-}" ]; then continue; fi
    local left=()
    for index in "${!running[@]}"; do
      pid=${running[$index]}
      if [ "$pid" = "$died" ]; then unset "running[$index]"; else left+=("$pid"); fi
    done
    running=("${left[@]+"${left[@]}"}")
    if [ "$code" -ne 0 ] && [ "$first" -eq 0 ]; then
      first=$code
      if [ "$code" -ne 143 ] && [ "$code" -ne 130 ] && [ ${#running[@]} -gt 0 ]; then
        echo "local.sh: one of $processes processes (pid $died) ended with code $code; the others end within a minute; the same command continues" >&2
      fi
    fi
  done
  return "$first"
}

if $dry_run; then
  if [ "$processes" -eq 1 ]; then do_it "${main[@]}"; else run_all; fi
  exit
fi
catch_signals
if [ "$processes" -eq 1 ]; then start=(run_one "${main[@]}"); else start=(run_all); fi
# on one line, which bash has read before the run: the file may change meanwhile
supervise "${positional[1]}" "" "" "${start[@]}"; exit
