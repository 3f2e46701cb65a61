#!/usr/bin/env bash
# Trains on every host of a TPU VM slice, through gcloud; makes the slice by a queued resource where asked.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [options] NAME ZONE CONFIG WORKDIR [--config.x.y=value ...]

  launch/tpu_vm.sh my-v6e-64 us-east5-b configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_large gs://bucket/run \
      --config.model.folder=gs://bucket/UAE --config.mesh.fsdp=-1 --config.mesh.data=1
  launch/tpu_vm.sh --create v6e-64 --spot my-v6e-64 us-east5-b configs/unified_grpo.py gs://bucket/run

Copies this checkout to all hosts, installs it there with libtpu, mounts the buckets that the arguments name (gs://BUCKET/PATH
becomes /mnt/BUCKET/PATH, by Cloud Storage FUSE) and starts uae_jax.main on each host. The same command continues a run that
was stopped. With --create the slice NAME is asked for as a queued resource; when it is preempted, it is asked for again and
the run goes on.

Options:
  --create TYPE       accelerator type of a slice to make, such as v5litepod-64, v6e-64, v5p-128
  --runtime VERSION   its software (default: by TYPE, such as v2-alpha-tpuv6e)
  --spot              make it of spot capacity
  --restarts N        how often a preempted slice is asked for again (default 100)
  --project PROJECT   instead of gcloud's default project
  --dry-run           print the commands and do nothing
  --help              this text
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
. launch/options.sh
read_options "create runtime restarts project" "spot" 4 "$@"
name=${positional[0]} type=${option[create]:-}
where=(--zone "${positional[1]}")
if [ -n "${option[project]:-}" ]; then where+=(--project "${option[project]}"); fi
if [ -z "$type" ] && [ -n "${option[spot]:-}${option[runtime]:-}" ]; then fail "--spot and --runtime need --create"; fi

runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "the software of $1 is not known; name it with --runtime" ;;
  esac
}

# ACTIVE, SUSPENDED, ... of the queued resource; empty without one
state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

make_slice() {
  local more=() runtime
  runtime=${option[runtime]:-$(runtime_of "$type")}
  if [ -n "${option[spot]:-}" ]; then more+=(--spot); fi
  if $dry_run || [ -z "$(state)" ]; then
    do_it gcloud compute tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
      --runtime-version "$runtime" "${where[@]}" "${more[@]}"
  fi
  if $dry_run; then
    echo "# waits until the queued resource is ACTIVE"
    return
  fi
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
    esac
    echo "tpu_vm.sh: the queued resource $name is ${now:-being asked for}" >&2
    sleep 30
  done
}

remove_slice() {
  do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

on_all_hosts() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"
}

mount_command() {
  cat <<TEXT
(command -v gcsfuse >/dev/null || (echo "deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main" | \
sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add - && \
sudo apt-get update -q && sudo apt-get install -qy gcsfuse)) && sudo mkdir -p /mnt/$1 && sudo chown "\$USER" /mnt/$1 && \
(mountpoint -q /mnt/$1 || gcsfuse --implicit-dirs --rename-dir-limit 100000 $1 /mnt/$1)
TEXT
}

main_arguments() {
  local argument
  printf ' %q' "--config=${positional[2]}" "--workdir=$(as_mounted "${positional[3]}")"
  for argument in "${positional[@]:4}"; do printf ' %q' "$(as_mounted "$argument")"; done
}

train() {
  local archive bucket parent
  archive=$(mktemp -u).tar.gz
  do_it git archive --format=tar.gz --prefix=uae_jax/ -o "$archive" HEAD
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name":uae_jax.tar.gz "${where[@]}" --worker=all
  on_all_hosts "tar xzf uae_jax.tar.gz && cd uae_jax && (test -x .venv/bin/python || (python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'))"
  for bucket in $(buckets_in "${positional[@]}"); do on_all_hosts "$(mount_command "$bucket")"; done
  parent=$(dirname "$(as_mounted "${positional[3]}")")
  on_all_hosts "cd uae_jax && mkdir -p $(printf %q "$parent") && .venv/bin/python -m uae_jax.main$(main_arguments)"
}

restarts=0
while true; do
  code=0
  if [ -z "$type" ] || make_slice; then train || code=$?; else code=1; fi
  if [ "$code" -eq 0 ] || [ -z "$type" ] || [ "$(state)" = ACTIVE ] || [ "$restarts" -ge "${option[restarts]:-100}" ]; then exit "$code"; fi
  restarts=$((restarts + 1))
  echo "tpu_vm.sh: the slice $name was taken away; it is asked for again ($restarts), and the run goes on" >&2
  remove_slice
done
