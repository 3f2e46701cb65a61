#!/usr/bin/env bash
# Checks the whole package on one NVIDIA card, and leaves one JSON and one Markdown file.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: benchmarks/gpu_check.sh [options]

  benchmarks/gpu_check.sh                                    # one card, at most 9 minutes, files in gpu_check/
  benchmarks/gpu_check.sh --parts device,steps               # some of it
  benchmarks/gpu_check.sh --python /opt/env/bin/python       # an environment that has all packages
  benchmarks/gpu_check.sh --size small --minutes 20          # a dry run, without a card

Random weights of full size are made on the card. Three steps of every stage, the forms of attention, the phases of a
step, and compiled PyTorch beside them are measured, the most valuable first (dev/gpu_check.md). A part that fails
costs no other one, and the same command again runs what is not done yet.

Without --python it uses python3 if that has all packages. Otherwise it makes .venv, which takes minutes and some 10 GB;
the installation does not count.

Options:
  --out DIR       where gpu_check.json and gpu_check.md are written (default: $OUT, or gpu_check)
  --minutes N     for all parts together (default 9)
  --size SIZE     full, or small for a dry run (default full)
  --parts A,B     some of device, steps, attention, phases, torch, or one stage of them such as steps:pretrain
  --work DIR      where compiled programs are kept for a second run (default: a folder among the temporary ones)
  --python PATH   an interpreter; nothing is installed into it
  --dry-run       print the commands and do nothing
  --help          this text
TEXT
}

here=$(pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
. launch/options.sh
read_options "out minutes size parts work python" "" 0 "$@"
if [ "${#positional[@]}" -gt 0 ]; then fail "unexpected argument ${positional[0]}"; fi

# A path that was given, seen from where the command was called.
given() {
  case $1 in
    /*) printf '%s' "$1" ;;
    *) printf '%s' "$here/$1" ;;
  esac
}

packages=(jax flax optax orbax.checkpoint grain ml_collections absl transformers safetensors torch diffusers peft)
size=${option[size]:-full}
# Whether an interpreter has all packages, and at full size jax's plugin for cards; none of them is imported.
complete() {
  "$1" - "$size" "${packages[@]}" >/dev/null 2>&1 <<'PYTHON'
import importlib.util
import sys


def has(name):
    return importlib.util.find_spec(name) is not None


_, size, *names = sys.argv
cards = size != "full" or has("jax_cuda13_plugin") or has("jax_cuda12_plugin")
sys.exit(not (cards and all(map(has, names))))
PYTHON
}

begin=$SECONDS
if [ -n "${option[python]:-}" ]; then
  python=${option[python]}
  case $python in
    */*) python=$(given "$python") ;;
  esac
elif complete python3; then
  python=python3
else
  python=.venv/bin/python
  if ! complete "$python"; then
    extra=.
    if [ "$size" = full ]; then extra='.[cuda]'; fi
    echo "gpu_check.sh: installing into .venv" >&2
    if [ ! -x "$python" ]; then do_it python3 -m venv .venv; fi
    # together, so that one resolution finds CUDA libraries for both
    do_it "$python" -m pip install -q "$extra" torch 'diffusers>=0.36' 'peft>=0.17'
  fi
fi
arguments=(--out "$(given "${option[out]:-${OUT:-gpu_check}}")" --setup-seconds "$((SECONDS - begin))")
for name in minutes size parts; do
  if [ -n "${option[$name]:-}" ]; then arguments+=("--$name" "${option[$name]}"); fi
done
if [ -n "${option[work]:-}" ]; then arguments+=(--work "$(given "${option[work]}")"); fi
if $dry_run; then
  do_it "$python" -m benchmarks.gpu_check "${arguments[@]}"
else
  exec "$python" -m benchmarks.gpu_check "${arguments[@]}"
fi
