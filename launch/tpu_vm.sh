#!/usr/bin/env bash
# Trains on every host of a TPU VM slice, through gcloud.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [--dry-run] NAME ZONE CONFIG WORKDIR [--config.x.y=value ...]

  launch/tpu_vm.sh my-v6e-64 us-east5-b configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_large gs://bucket/run \
      --config.model.folder=/weights/UAE --config.mesh.fsdp=-1 --config.mesh.data=1

Copies this checkout to all hosts, installs it there with libtpu, and starts uae_jax.main on each of them.
The same command continues a run that was stopped or preempted.
TEXT
}

dry_run=false
case "${1:-}" in
  -h | --help | "") usage; exit 0 ;;
  --dry-run) dry_run=true; shift ;;
esac
if [ $# -lt 4 ]; then usage >&2; exit 2; fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
cd "$(dirname "$0")/.."

do_it() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

arguments=$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")
archive=$(mktemp -u).tar.gz
do_it git archive --format=tar.gz --prefix=uae_jax/ -o "$archive" HEAD
do_it gcloud compute tpus tpu-vm scp "$archive" "$name":uae_jax.tar.gz --zone "$zone" --worker=all
remote="tar xzf uae_jax.tar.gz && cd uae_jax && (test -x .venv/bin/python || (python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'))"
do_it gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$remote && .venv/bin/python -m uae_jax.main$arguments"
