#!/usr/bin/env bash
# Runs a command on this host's NVIDIA cards: checks the host, sets the flags of XLA and NCCL, and becomes the command.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/on_cards.sh COMMAND [ARGUMENT ...]

  launch/on_cards.sh python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/tiny

Started once for every process of a run, by launch/slurm.sh, launch/gke_xpk.sh and the container (launch/Dockerfile).
A host that cannot run ends with code 2 and one line that says why. What the environment sets already stays as it is.

Environment:
  JAX_PLATFORMS=cpu     runs without cards, checks and flags
  UAE_GPU_CHECKS=off    sets the flags without the checks
TEXT
}

folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/options.sh
. "$folder/options.sh"
# shellcheck source=launch/gpu.sh
. "$folder/gpu.sh"
case ${1:-} in
  -h | --help)
    usage
    exit 0
    ;;
  "") fail "it needs a command" ;;
  -*) fail "unknown option $1" ;;
esac

if cards_wanted; then
  find_driver
  # one process checks for all of its host
  if [ "${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}" -eq 0 ]; then gpu_checks "$(processes_here)" "$(hosts_of_run)"; fi
  gpu_flags
fi
exec "$@"
