#!/usr/bin/env bash
# Trains on this machine, and starts again after a preemption until the run is finished.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [--dry-run] CONFIG WORKDIR [--config.x.y=value ...]

  launch/local.sh configs/unified_grpo.py runs/tiny
  launch/local.sh configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium /data/run --config.model.folder=/weights/UAE

Makes .venv with the jax build of this machine (CUDA where nvidia-smi works) on the first run.
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
cd "$(dirname "$0")/.."

do_it() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

extra=""
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then extra="[cuda]"; fi
if [ ! -x .venv/bin/python ]; then
  do_it python3 -m venv .venv
  do_it .venv/bin/pip install -q ".$extra"
fi
while true; do
  code=0
  do_it .venv/bin/python -m uae_jax.main --config="$config" --workdir="$workdir" "$@" || code=$?
  # 143 is a SIGTERM that was obeyed with a checkpoint: a preemption, after which the machine may go on
  if [ "$code" -ne 143 ]; then exit "$code"; fi
  sleep 10
done
