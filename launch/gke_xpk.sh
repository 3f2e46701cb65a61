#!/usr/bin/env bash
# Trains on GKE through xpk: TPU slices or GPU nodes of a cluster, restarted by its JobSet after a preemption.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gke_xpk.sh [options] CLUSTER WORKLOAD CONFIG WORKDIR [--config.x.y=value ...]

  launch/gke_xpk.sh --tpu-type v6e-64 --zone us-east5-b --storage bucket my-cluster uae-large \
      configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_large gs://bucket/run --config.model.folder=gs://bucket/UAE \
      --config.data.folder=gs://bucket/longcap
  launch/gke_xpk.sh --device-type h200-141gb-8 --nodes 2 --zone us-east5-b --storage bucket my-cluster uae-medium \
      configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium gs://bucket/run \
      --config.model.folder=gs://bucket/UAE --config.data.folder=gs://bucket/longcap

Needs xpk (pip install xpk), gcloud and a cluster that xpk made. Buckets must be attached to the cluster once, mounted at
/mnt/BUCKET, so that every pod sees one and the same work folder:
  xpk storage attach BUCKET --type=gcsfuse --bucket=BUCKET --mount-point=/mnt/BUCKET --readonly=false --size=1 --auto-mount=false \
      --mount-options=implicit-dirs,rename-dir-limit=100000 --cluster=CLUSTER --zone=ZONE
The checkout is added to the base image; each pod installs it with the versions of launch/requirements-tpu.txt or -cuda.txt, and
starts uae_jax.main. With --built nothing is installed: the image has all of it (launch/Dockerfile). Pods with GPUs are checked
first, and flags of XLA and NCCL are set. A pod that is evicted gets SIGTERM, all processes save, and the JobSet starts again in
the same WORKDIR. So it does after failures of machines and network, and not after an error of the run's user.

Options:
  --tpu-type TYPE       such as v5litepod-64, v6e-64, v5p-128; or
  --device-type TYPE    such as h200-141gb-8
  --slices N            TPU slices (default 1)
  --nodes N             GPU nodes (default 1)
  --storage NAMES       attached storages, separated by commas
  --image IMAGE         base image with Python 3.12 (default python:3.12.13-slim-bookworm)
  --built IMAGE         instead: an image made of launch/Dockerfile, which you have pushed
  --restarts N          how often the JobSet starts again (default 100)
  --retries N           how often in a row without progress (default 5)
  --priority LEVEL      very-low, low, medium, high or very-high (default medium)
  --zone ZONE, --project PROJECT
  --dry-run             print the command and do nothing
  --help                this text
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
. launch/options.sh
read_options "tpu-type device-type slices nodes storage image built restarts retries priority zone project" "" 4 "$@"
tpu=${option[tpu-type]:-} device=${option[device-type]:-}
if [ -z "$tpu$device" ] || { [ -n "$tpu" ] && [ -n "$device" ]; }; then fail "give one of --tpu-type and --device-type"; fi
if [ -n "${option[image]:-}" ] && [ -n "${option[built]:-}" ]; then fail "give one of --image and --built"; fi

extra=cuda start="bash launch/on_cards.sh python" shape=(--device-type="$device" --num-nodes="${option[nodes]:-1}")
if [ -n "$tpu" ]; then extra=tpu start=python shape=(--tpu-type="$tpu" --num-slices="${option[slices]:-1}"); fi
for name in zone project; do
  if [ -n "${option[$name]:-}" ]; then shape+=("--$name=${option[$name]}"); fi
done
IFS=, read -r -a storages <<<"${option[storage]:-}"
for name in "${storages[@]}"; do shape+=(--storage="$name"); done

arguments=$(printf ' %q' "--config=${positional[2]}" "--workdir=$(as_mounted "${positional[3]}")")
for argument in "${positional[@]:4}"; do arguments+=$(printf ' %q' "$(as_mounted "$argument")"); done
for bucket in $(buckets_in "${positional[@]}"); do
  if [[ " ${storages[*]} " != *" $bucket "* ]]; then
    echo "gke_xpk.sh: the arguments name gs://$bucket; it must be attached to the cluster at /mnt/$bucket (see --help)" >&2
  fi
done

image=(--base-docker-image="${option[image]:-python:3.12.13-slim-bookworm}" --script-dir=.) install="--install $extra "
if [ -n "${option[built]:-}" ]; then image=(--docker-image="${option[built]}") install=; fi

# The JobSet starts again after the codes 127 to 255 and those that are named here; any other fails it at once.
do_it xpk workload create --cluster="${positional[0]}" --workload="${positional[1]}" "${shape[@]}" "${image[@]}" \
  --priority="${option[priority]:-medium}" --max-restarts="${option[restarts]:-100}" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  --command="exec env UAE_RUN=xpk-${positional[1]} UAE_RETRIES=${option[retries]:-5} bash launch/in_pod.sh $install$(printf %q "$(as_mounted "${positional[3]}")") $start -m uae_jax.main$arguments"
