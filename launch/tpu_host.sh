#!/usr/bin/env bash
# The part of launch/tpu_vm.sh that runs on each host of a slice: environment, detached start, status, log, stop.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_host.sh prepare
       launch/tpu_host.sh start STAMP RUN RETRIES BUCKETS WORKDIR MAIN_ARGUMENT ...
       launch/tpu_host.sh alive | status | follow | stop | resume

launch/tpu_vm.sh calls it over ssh. `start` returns at once; the run goes on without a connection, and a supervisor starts it
again after failures of machines and networks. It keeps these in ~/uae_run:

  log       what the run said
  command   the words behind `start`, for `resume` after a boot of the host
  pid       of the supervisor
  child     of the run
  starts    a line for each start
  ended     exit code and reason, once it has ended
  stop      there once it was told to stop
TEXT
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$checkout"
# shellcheck source=launch/options.sh
. launch/options.sh
# shellcheck source=launch/supervise.sh
. launch/supervise.sh
place=$HOME/uae_run
first_wait=${UAE_WAIT:-60} # longer than the heartbeat, after which the other hosts notice that one is gone

UV=0.13.9 # brings a Python that this package needs; the images have 3.10
PYTHON=3.12

find_uv() {
  if ! command -v uv >/dev/null 2>&1 && [ ! -x "$HOME/.local/bin/uv" ]; then
    if ! python3 -m pip --version >/dev/null 2>&1; then install_packages python3-pip; fi
    python3 -m pip install -q --user "uv==$UV"
  fi
  export PATH=$PATH:$HOME/.local/bin
}

# A new host may be upgrading itself, which holds apt's lock for minutes.
install_packages() {
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -qy "$@"
}

prepare() {
  if [ -x .venv/bin/python ] && cmp -s launch/requirements-tpu.txt .venv/installed.txt; then return; fi
  find_uv
  rm -rf .venv
  uv venv -q --python "$PYTHON" .venv
  uv pip install -q --python .venv/bin/python -r launch/requirements-tpu.txt
  uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
  cp launch/requirements-tpu.txt .venv/installed.txt
}

# mount_buckets NAME,NAME: each under /mnt; again where a mount was lost, as after a boot.
mount_buckets() {
  local bucket names=()
  IFS=, read -r -a names <<<"$1"
  for bucket in "${names[@]}"; do
    if mountpoint -q "/mnt/$bucket" && ls "/mnt/$bucket" >/dev/null 2>&1; then continue; fi
    if ! command -v gcsfuse >/dev/null 2>&1; then
      echo "deb https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add -
      install_packages gcsfuse
    fi
    fusermount -uz "/mnt/$bucket" 2>/dev/null || true
    sudo mkdir -p "/mnt/$bucket"
    sudo chown "$(id -un)" "/mnt/$bucket"
    gcsfuse --implicit-dirs --rename-dir-limit 100000 "$bucket" "/mnt/$bucket" || return 1
  done
}

# is_running FILE WORDS: whether the process that a file names has these words in its command. After a boot of the host the number
# may be that of another process.
is_running() {
  local pid
  pid=$(cat "$place/$1" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q "$2"
}

alive() {
  is_running pid 'tpu_host.sh run'
}

# A boot of the host ends everything; cron starts the run again.
keep_over_boots() {
  if command -v crontab >/dev/null 2>&1; then
    { crontab -l 2>/dev/null | grep -v 'tpu_host.sh resume' || true; echo "@reboot bash $checkout/launch/tpu_host.sh resume"; } | crontab -
  fi
}

# A run whose supervisor is gone still holds the chips.
end_child() {
  local turn
  for ((turn = 0; turn < 120; turn++)); do
    if ! is_running child uae_jax.main; then return 0; fi
    if [ "$turn" -eq 0 ]; then kill -TERM "$(cat "$place/child")" 2>/dev/null || true; fi
    sleep 1
  done
  kill -KILL "$(cat "$place/child")" 2>/dev/null || true
}

start() {
  # gcloud repeats a command whose connection failed; the run may have ended since
  if alive || { [ -e "$place/ended" ] && [[ $(cat "$place/command") == "$1 "* ]]; }; then return; fi
  mkdir -p "$place"
  end_child
  rm -f "$place"/{ended,stop,restarts,child,starts}
  if [ -e "$place/log" ]; then mv "$place/log" "$place/log.before"; fi
  printf '%q ' "$@" >"$place/command"
  keep_over_boots
  detach
}

# Starts the supervisor in a session of its own, so that the end of the connection does not reach it.
detach() {
  setsid nohup bash "$checkout/launch/tpu_host.sh" run >>"$place/log" 2>&1 </dev/null &
  echo "$!" >"$place/pid"
}

resume() {
  if alive || [ ! -e "$place/command" ] || [ -e "$place/ended" ] || [ -e "$place/stop" ]; then return; fi
  detach
}

# One start of the run; leaves what it said in a file.
one_start() {
  local before code=0
  before=$(wc -c <"$place/log")
  mount_and_run "$@" || code=$?
  tail -c +$((before + 1)) "$place/log" >"$place/said"
  return "$code"
}

mount_and_run() {
  local code=0
  # a bucket that cannot be mounted now may be later
  { mount_buckets "$buckets" && mkdir -p "$(dirname "$workdir")"; } || return "$START_AGAIN"
  if $stopped; then return 143; fi
  echo "$SECONDS" >>"$place/starts"
  "$@" 9>&- &
  running=("$!")
  echo "$!" >"$place/child"
  wait_for "$!" || code=$?
  running=()
  rm -f "$place/child"
  return "$code"
}

# Whether another host has ended the run; the work folder is the one place that all hosts see.
ended_elsewhere() {
  local word reason
  if [ -e "$place/stop" ]; then elsewhere=143 && return; fi
  if ! read -r word reason <"$workdir/.ended-$stamp" 2>/dev/null; then return 1; fi
  elsewhere=$word why="$reason"
  say "$reason"
}

run() {
  local code=0 words=() why=""
  exec 9>"$place/lock"
  if ! flock -n 9; then return; fi # `start` and `resume` at one time
  eval "words=($(cat "$place/command"))"
  stamp=${words[0]} retries=${words[2]} buckets=${words[3]} workdir=${words[4]}
  echo "$$" >"$place/pid"
  export UAE_RUN=${words[1]} PYTHONUNBUFFERED=1
  # the end of a host, and `stop`, send the signal to the run as well; a second one would end it unsaved
  forward=false
  catch_signals
  supervise "$workdir" "$place/restarts" "$place/said" one_start .venv/bin/python -m uae_jax.main "${words[@]:5}" || code=$?
  if $stopped && [ ! -e "$place/stop" ]; then return; fi # the host goes down, and `resume` goes on
  if [ -z "$why" ]; then
    case $code in
      0) why="done" ;;
      1) why=$(grep -E '^(error: |[A-Za-z_.]*(Error|Exception)\b)' "$place/said" | tail -n 1 || true) ;;
      "$GIVEN_UP") why="given up after starts without progress" ;;
      *) why=$(meaning "$code") ;;
    esac
    if [ -e "$place/stop" ]; then why="told to stop ($why)"; fi
    if [ -d "$workdir" ]; then
      find "$workdir" -maxdepth 1 -name '.ended-*' ! -name ".ended-$stamp" -delete 2>/dev/null || true
      echo "$code on ${HOSTNAME:-a host}: $why" 2>/dev/null >"$workdir/.ended-$stamp" || true
    fi
  fi
  echo "$code $why" >"$place/ended"
}

# One line for launch/tpu_vm.sh, which reads its words up to the bar.
status() {
  local code="" reason="" state=absent words=() starts=0
  if [ -e "$place/command" ]; then
    eval "words=($(cat "$place/command"))"
    state=lost
    if alive; then state=running; fi
    if [ -r "$place/ended" ]; then
      read -r code reason <"$place/ended"
      state=ended
    fi
    if [ -e "$place/starts" ]; then starts=$(wc -l <"$place/starts"); fi
  fi
  echo "uae_run ${HOSTNAME:-host} $state ${code:--} ${words[0]:--} $(command_id "${words[@]:4}") $starts | $reason"
}

# follow [again]: the log until the run has ended; of one that has, the last lines, unless they were shown before.
follow() {
  local pid
  if [ ! -e "$place/log" ]; then return; fi
  if pid=$(cat "$place/pid" 2>/dev/null) && alive; then
    tail -n "${UAE_LINES:-20}" -s "${UAE_LOOK:-1}" -F --pid="$pid" "$place/log" 2>/dev/null
  elif [ -z "${1:-}" ]; then
    tail -n "${UAE_LINES:-20}" "$place/log"
  fi
}

stop() {
  if ! alive; then return; fi
  touch "$place/stop"
  if is_running child uae_jax.main; then kill -TERM "$(cat "$place/child")" 2>/dev/null || true; fi
  kill -TERM "$(cat "$place/pid")" 2>/dev/null || true
}

case ${1:-} in
  -h | --help) usage ;;
  prepare | start | alive | resume | run | status | follow | stop) "$@" ;;
  *) fail "it needs one of prepare, start, alive, status, follow, stop and resume" ;;
esac
