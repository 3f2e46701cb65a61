#!/usr/bin/env bash
# Trains on every host of a TPU VM slice, through gcloud; the run needs this machine only to start.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [options] NAME ZONE CONFIG WORKDIR [--config.x.y=value ...]
       launch/tpu_vm.sh --follow | --status | --stop [--project PROJECT] NAME ZONE

  launch/tpu_vm.sh my-v6e-64 us-east5-b configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_large gs://bucket/run \
      --config.model.folder=gs://bucket/UAE --config.mesh.fsdp=-1 --config.mesh.data=1
  launch/tpu_vm.sh --create v6e-64 --spot my-v6e-64 us-east5-b configs/unified_grpo.py gs://bucket/run
  launch/tpu_vm.sh --follow my-v6e-64 us-east5-b

Copies the committed checkout to all hosts and installs Python 3.12 and launch/requirements-tpu.txt there. Mounts the buckets that
the arguments name (gs://BUCKET/PATH becomes /mnt/BUCKET/PATH, by Cloud Storage FUSE). Starts uae_jax.main on each host, detached,
and shows the log of the first one. Ctrl-C, a closed laptop or a lost connection ends only this view.

The same command is always right. It starts the run, or shows one that is going on, or continues one that was stopped. On the
hosts a run is started again after failures of machines and networks, and not after an error of its user. With --create the slice
NAME is asked for as a queued resource; when it is preempted, it is asked for again and the run goes on, while this command runs.

Options:
  --create TYPE       accelerator type of a slice to make, such as v5litepod-64, v6e-64, v5p-128
  --runtime VERSION   its software (default: by TYPE, such as v2-alpha-tpuv6e)
  --spot              make it of spot capacity
  --restarts N        how often a slice that was taken away is asked for again (default 100)
  --retries N         how often in a row the run is started again without progress (default 5)
  --detach            end as soon as the run has started
  --follow            show the log of a run until it ends, and end with its exit code
  --status            one line for each host
  --stop              let the run save and end
  --project PROJECT   instead of gcloud's default project
  --dry-run           print the commands and do nothing
  --help              this text

Exit codes: that of the run (0 done, 1 an error of its settings or data, 69 given up after starts without progress), or
75 where the slice or the connection is gone and another start may help.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
. launch/options.sh
# shellcheck source=launch/supervise.sh
. launch/supervise.sh
needed=4
for word in "$@"; do
  case $word in
    --follow | --status | --stop) needed=2 ;;
  esac
done
read_options "create runtime restarts retries project" "spot detach follow status stop" "$needed" "$@"
name=${positional[0]} zone=${positional[1]} type=${option[create]:-}
where=(--zone "$zone")
if [ -n "${option[project]:-}" ]; then where+=(--project "${option[project]}"); fi
if [ -z "$type" ] && [ -n "${option[spot]:-}${option[runtime]:-}" ]; then fail "--spot and --runtime need --create"; fi
look=${UAE_LOOK:-30} # seconds between looks at a slice that is not ready
attempts=8           # at a call of gcloud that fails for its connection

# What gcloud and ssh say of a failure that passes.
PASSING='UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED.*rate|HTTP(Error| ).?(429|50[0-9])|[Tt]imed out|[Cc]onnection'
PASSING+='|Temporary failure|[Bb]roken pipe|error sending request|kex_exchange|SSH .*error|try again'

runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "the software of $1 is not known; name it with --runtime" ;;
  esac
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# gcloud, again while its connection fails; what it answers is in $answer, and what it says in $scratch/said.
cloud() {
  local turn code
  for ((turn = 1; turn <= attempts; turn++)); do
    code=0
    answer=$(gcloud compute tpus "$@" 2>"$scratch/said") || code=$?
    if [ "$code" -eq 0 ]; then return; fi
    if [ "$code" -ne 255 ] && ! grep -qE "$PASSING" "$scratch/said"; then return "$code"; fi
    if [ "$turn" -lt "$attempts" ]; then
      say "gcloud $1 $2 failed ($(tail -n 1 "$scratch/said")); it is tried again"
      nap "$(fruitless=$turn wait_before)"
    fi
  done
  return "$START_AGAIN"
}

# The same where a failure is the end.
must() {
  local code=0
  if $dry_run; then
    do_it gcloud compute tpus "$@"
    return
  fi
  cloud "$@" || code=$?
  if [ -n "$answer" ]; then echo "$answer"; fi
  if [ "$code" -ne 0 ]; then
    cat "$scratch/said" >&2
    return "$code"
  fi
}

on_hosts() {
  must tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command "cd uae_jax && bash launch/tpu_host.sh $2"
}

# The state that a command of gcloud describes; "none" where there is no such thing, "unknown" where gcloud does not answer, and
# "refused" where it never will.
described() {
  local kind=$1 field=$2 code=0
  cloud "$kind" describe "$name" "${where[@]}" --format="value($field)" || code=$?
  if [ "$code" -eq 0 ]; then
    echo "${answer:-unknown}"
  elif grep -qiE 'NOT_FOUND|not found' "$scratch/said"; then
    echo none
  else
    tail -n 1 "$scratch/said" >&2
    if [ "$code" -eq "$START_AGAIN" ]; then echo unknown; else echo refused; fi
  fi
}

# ready, coming, gone, failed, stopped, none, refused or unknown
slice_state() {
  local now
  if [ -n "$type" ]; then
    now=$(described queued-resources state.state)
    case $now in
      ACTIVE) ;;
      none | unknown | refused) echo "$now" && return ;;
      FAILED) echo failed && return ;;
      SUSPENDED | SUSPENDING) echo gone && return ;;
      *) echo coming && return ;;
    esac
  fi
  now=$(described tpu-vm state)
  case $now in
    READY) echo ready ;;
    none) if [ -n "$type" ]; then echo gone; else echo none; fi ;;
    PREEMPTED | TERMINATED | DELETING | HIDING | HIDDEN) echo gone ;;
    STOPPED | STOPPING) echo stopped ;; # by a person, whose disks are still there
    unknown | refused) echo "$now" ;;
    *) echo coming ;; # CREATING, STARTING, RESTARTING, REPAIRING
  esac
}

ask_for_slice() {
  local more=() runtime
  runtime=${option[runtime]:-$(runtime_of "$type")} || return 2
  if [ -n "${option[spot]:-}" ]; then more+=(--spot); fi
  must queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" "${where[@]}" "${more[@]}"
}

remove_slice() {
  must queued-resources delete "$name" "${where[@]}" --force --quiet || grep -qiE 'NOT_FOUND|not found' "$scratch/said"
}

# Waits until the slice is there. Code 75: it is gone, and is not to be asked for again.
failures=0 asked_again=0
need_slice() {
  local now before=""
  while true; do
    now=$(slice_state)
    case $now in
      ready)
        failures=0
        return
        ;;
      none)
        if [ -z "$type" ]; then
          say "there is no slice $name in $zone; --create TYPE makes it"
          return 1
        fi
        ask_for_slice || return 1
        ;;
      gone | failed)
        if [ -z "$type" ]; then
          say "the slice $name was taken away; --create TYPE makes it again, and the run goes on"
          return "$START_AGAIN"
        fi
        if [ "$now" = failed ]; then failures=$((failures + 1)); fi
        if [ "$failures" -ge 3 ]; then
          say "the queued resource $name failed $failures times; see gcloud compute tpus queued-resources describe $name --zone $zone"
          return 1
        fi
        if [ "$asked_again" -ge "${option[restarts]:-100}" ]; then
          say "the slice $name was taken away again after $asked_again times; raise --restarts, or start later"
          return "$START_AGAIN"
        fi
        asked_again=$((asked_again + 1))
        say "the slice $name was taken away; it is asked for again ($asked_again), and the run goes on"
        remove_slice || return "$START_AGAIN"
        continue
        ;;
      stopped)
        say "the slice $name is stopped; gcloud compute tpus tpu-vm start $name --zone $zone brings it back"
        return 1
        ;;
      refused) return 1 ;;
      *) if [ "$now" != "$before" ]; then say "waiting for the slice $name (${now/unknown/gcloud does not answer})"; fi ;;
    esac
    before=$now
    nap "$look"
  done
}

# Lines of launch/tpu_host.sh, one a host: uae_run HOST STATE CODE STAMP COMMAND STARTS | REASON
host_lines() {
  cloud tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command "if [ -e uae_jax/launch/tpu_host.sh ]; then bash uae_jax/launch/tpu_host.sh status; else echo uae_run \$HOSTNAME absent - - - 0; fi" || return "$?"
  hosts=$(grep '^uae_run ' <<<"$answer" || true)
  [ -n "$hosts" ]
}

# in_state STATE: the lines of hosts in a state.
in_state() {
  awk -v wanted="$1" '$3 == wanted' <<<"$hosts"
}

show_hosts() {
  local label host state code starts reason
  while read -r label host state code _ _ starts _ reason; do
    if [ "$label" = uae_run ]; then
      echo "$host: $state$(if [ "$code" != - ]; then echo " with code $code"; fi)$(if [ "$starts" -gt 1 ]; then echo ", started $starts times"; fi)${reason:+, $reason}"
    fi
  done <<<"$hosts"
}

main_words() {
  local argument
  words=("$(as_mounted "${positional[3]}")" "--config=${positional[2]}" "--workdir=$(as_mounted "${positional[3]}")")
  for argument in "${positional[@]:4}"; do words+=("$(as_mounted "$argument")"); done
}

# Copies, installs and starts on all hosts; hosts where the run is alive stay as they are.
start_run() {
  local archive=$scratch/uae_jax.tar.gz stamp=$1 buckets
  if $dry_run; then archive=uae_jax.tar.gz; fi
  if ! $dry_run && [ -n "$(git status --porcelain --untracked-files=no 2>/dev/null)" ]; then
    say "changes that are not committed stay here; the hosts get the newest commit"
  fi
  buckets=$(buckets_in "${positional[@]}" | paste -sd, -)
  do_it git archive --format=tar.gz --prefix=uae_jax/ -o "$archive" HEAD || return 1
  must tpu-vm scp "$archive" "$name":uae_jax.tar.gz "${where[@]}" --worker=all || return "$?"
  must tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command "bash uae_jax/launch/tpu_host.sh alive 2>/dev/null || (tar xzf uae_jax.tar.gz && bash uae_jax/launch/tpu_host.sh prepare)" || return "$?"
  on_hosts all "start $stamp tpu-$name.$zone ${option[retries]:-5} $(printf '%q' "$buckets")$(printf ' %q' "${words[@]}")"
}

# Shows the log until the run has ended, over lost connections. Sets `code`; 75 where hosts or the slice are gone.
watch_run() {
  local state turn=0 again="" told=""
  # gcloud handles Ctrl-C itself, after which this script would go on
  trap 'say "the run goes on; launch/tpu_vm.sh --follow $name $zone shows it, and --stop ends it"; exit 130' INT
  while true; do
    # its code may be that of the connection; the hosts are asked
    gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command "cd uae_jax && bash launch/tpu_host.sh follow $again" || true
    again=again
    if attempts=1 host_lines; then
      turn=0
      if [ -n "$(in_state absent)$(in_state lost)" ]; then code=$START_AGAIN && return; fi
      if [ -z "$(in_state running)" ]; then
        # an error of the user explains the codes of the other hosts
        code=$(in_state ended | awk '{ print $4 }' | sort -n | awk '$1 > 0 && $1 < 69 { found = $1 } { last = $1 } END { print found ? found : last }')
        show_hosts >&2
        return
      fi
      if [ "$told" != "$hosts" ]; then say "the connection ended, and the run goes on ($(in_state running | wc -l) hosts); connecting again"; fi
      told=$hosts
    else
      state=$(slice_state)
      case $state in
        gone | none | failed | stopped) code=$START_AGAIN && return ;;
        coming) ;; # its machines are repaired; the run goes on by itself
        *) turn=$((turn + 1)) ;;
      esac
      say "the hosts of $name do not answer (the slice: ${state/coming/not ready}); connecting again"
      if [ "$turn" -ge "$attempts" ]; then
        say "no connection to $name, where the run may go on; launch/tpu_vm.sh --follow $name $zone connects again"
        code=$START_AGAIN unreachable=true
        return
      fi
    fi
    nap "$(fruitless=$turn wait_before)"
  done
}

if [ -n "${option[status]:-}" ]; then
  if $dry_run; then on_hosts all status && exit; fi
  if ! attempts=2 host_lines; then
    echo "the slice $name is $(slice_state), and its hosts do not answer"
    exit "$START_AGAIN"
  fi
  show_hosts
  exit
fi
if [ -n "${option[stop]:-}" ]; then
  on_hosts all stop
  exit
fi
if [ -n "${option[follow]:-}" ]; then
  if $dry_run; then on_hosts 0 follow && exit; fi
  code=0
  watch_run
  if [ -z "${hosts:-}" ] || [ -n "$(in_state absent)$(in_state lost)" ]; then
    say "the slice $name is $(slice_state); the command that started the run goes on with it, from its newest checkpoint"
  fi
  exit "$code"
fi

main_words
command=$(command_id "${words[@]}")
if $dry_run; then
  if [ -n "$type" ]; then
    ask_for_slice
    echo "# waits until the slice is there"
  fi
  start_run STAMP
  exit
fi
lost=0 unreachable=false
while true; do
  need_slice || exit "$?"
  code=0 stamp=$(date +%s) hosts=
  if host_lines && [ -n "$(in_state running)" ]; then
    if [ -n "$(in_state running | awk -v own="$command" '$6 != own')" ]; then
      fail "another run is going on at $name: $(in_state running | head -n 1 | cut -d ' ' -f 2,3); stop it with --stop, or use another slice"
    fi
    stamp=$(in_state running | awk 'NR == 1 { print $5 }')
  fi
  if [ -z "$(in_state running)" ] || [ -n "$(in_state absent)$(in_state lost)" ]; then
    start_run "$stamp" || code=$?
    if [ "$code" -ne 0 ]; then
      if [ "$(slice_state)" = ready ]; then exit "$code"; fi
      continue # it was taken away meanwhile
    fi
  fi
  if [ -n "${option[detach]:-}" ]; then
    say "the run goes on without this machine; launch/tpu_vm.sh --follow $name $zone shows it"
    exit
  fi
  watch_run
  if $unreachable || [ "$code" -ne "$START_AGAIN" ]; then exit "$code"; fi
  if [ "$(slice_state)" = ready ]; then lost=$((lost + 1)); fi # hosts of it were made anew
  if [ "$lost" -gt "${option[restarts]:-100}" ]; then
    say "hosts of the slice $name were lost again after $((lost - 1)) times; start later, or take another slice"
    exit "$code"
  fi
done
