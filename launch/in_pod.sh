#!/usr/bin/env bash
# Runs one process of a run in a pod, and answers by its exit code whether the pods should start again.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/in_pod.sh [options] WORKDIR COMMAND [ARGUMENT ...]

Started once in every pod, by launch/gke_xpk.sh. Its exit codes, for a policy that looks at codes alone:

  0            done
  1 to 68      an error of the user, of the settings or of the code: do not start again
  69           started often enough without a new line of metrics or checkpoint: do not start again
  75, 129-192  machines or network, or stopped by a signal with everything saved: start again

Options:
  --install NAME   first install launch/requirements-NAME.txt and this checkout
  --help           this text

Environment:
  UAE_RETRIES=N    how many starts in a row may be without progress (default 5)
TEXT
}

# shellcheck source=launch/options.sh
. "$(dirname "${BASH_SOURCE[0]}")/options.sh"
# shellcheck source=launch/supervise.sh
. "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

extra=
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --install)
      if [ $# -lt 2 ]; then fail "option --install needs a value"; fi
      extra=$2
      shift
      ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done
if [ $# -lt 2 ]; then fail "it needs a work folder and a command"; fi
workdir=$1
shift

install() {
  pip install -q --no-cache-dir --root-user-action=ignore -r "launch/requirements-$extra.txt" &&
    pip install -q --no-cache-dir --root-user-action=ignore --no-deps --no-build-isolation .
}

# Whether this is the first pod of a run, which counts the starts for all.
first_pod() {
  [ "${JOB_COMPLETION_INDEX:-${NODE_RANK:-0}}" -eq 0 ] && [ "${MEGASCALE_SLICE_ID:-0}" -eq 0 ]
}

catch_signals
if [ -n "$extra" ]; then
  # a network that fails for minutes must not end the run for good
  until install; do
    fruitless=$((fruitless + 1))
    if $stopped; then exit 143; fi
    if [ "$fruitless" -gt "$retries" ]; then
      say "launch/requirements-$extra.txt cannot be installed; see the errors of pip above"
      exit 1
    fi
    nap "$(wait_before)"
  done
  fruitless=0
fi
mkdir -p "$(dirname "$workdir")"

said=$(mktemp) code=0 counts=
trap 'rm -f "$said"' EXIT
if first_pod; then counts=$workdir/.restarts; fi
begin "$workdir" "$counts"
if $stopped; then exit 143; fi
run_logged "$said" "$@" || code=$?
word=$(verdict "$code" "$said")
if [ "$word" = again ]; then
  if [ "$code" -eq 1 ]; then code=$START_AGAIN; fi
  if [ -n "$counts" ] && ! may_start_again "$workdir" "$counts"; then code=$GIVEN_UP; fi
else
  if [ -n "$counts" ]; then rm -f "$counts"; fi
  if [ "$word" = stop ]; then say "the run ended ($(meaning "$code")), which is no failure of machines or network; it is not started again"; fi
  # a policy by codes takes those from 127 on for infrastructure
  if [ "$code" -gt 126 ]; then code=1; fi
fi
exit "$code"
