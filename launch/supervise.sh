# shellcheck shell=bash
# Read by the scripts beside it: the one policy of when a run is started again. It is after failures of machines and networks,
# so often in a row without progress, and never after an error of its user.

# Environment: so many starts in a row without progress, and the first wait in seconds, which doubles up to the longest.
retries=${UAE_RETRIES:-5}
first_wait=${UAE_WAIT:-15}
longest_wait=${UAE_LONGEST_WAIT:-600}

START_AGAIN=75 # what uae_jax.main, and this file, answer when another start may help
GIVEN_UP=69    # what this file answers when the starts were in vain
# jax ends a process with code 1 and this text, and srun reports these, when another process or a node is gone
LOST='Terminating process because the JAX distributed service detected fatal errors'
LOST+='|srun: error: .*(Node failure|Communication connection failure|Socket timed out|Zero Bytes were transmitted)'
LOST+='|CANCELLED AT .* DUE TO (NODE FAILURE|PREEMPTION)'
# main says these of an error of its own; the first as one of several tasks, by number
OWN='^([0-9]+: )?error: |the other processes end too'
OF_OTHERS='error: another process of this run is gone'

running=()
stopped=false
interrupted=false
napping=
forward=true # a signal goes on to the command; false where whoever sends it reaches the command too

say() {
  echo "$(basename "$0") on ${HOSTNAME:-this host}: $1" >&2
}

# verdict CODE [FILE WITH WHAT WAS SAID]: done, again or stop.
verdict() {
  local code=$1 said=${2:-/dev/null} own=""
  if [ "$code" -eq 0 ]; then
    echo "done"
  elif [ "$code" -eq "$START_AGAIN" ] || { [ "$code" -gt 128 ] && [ "$code" -le 192 ]; }; then
    echo again # 128 + a signal: stopped with everything saved, or killed
  elif [ "$code" -eq 1 ] && grep -qE "$LOST" "$said"; then
    own=$(grep -E "$OWN" "$said" | grep -v "$OF_OTHERS" || true)
    if [ -n "$own" ]; then echo stop; else echo again; fi
  else
    echo stop
  fi
}

meaning() {
  case $1 in
    "$START_AGAIN") echo "code 75, machines or network" ;;
    129 | 130 | 143) echo "code $1, stopped by a signal with everything saved" ;;
    137) echo "code 137, killed, such as for want of memory on the host" ;;
    *) if [ "$1" -gt 128 ] && [ "$1" -le 192 ]; then echo "code $1, ended by signal $(($1 - 128))"; else echo "code $1"; fi ;;
  esac
}

catch_signals() {
  trap caught TERM INT
}

caught() {
  stopped=true interrupted=true
  if [ -n "$napping" ]; then kill "$napping" 2>/dev/null || true; fi
  if $forward && [ ${#running[@]} -gt 0 ]; then kill -TERM "${running[@]}" 2>/dev/null || true; fi
}

# Waits for a process, over signals that arrive meanwhile, and returns its code.
wait_for() {
  local code
  while true; do
    code=0 interrupted=false
    wait "$1" || code=$?
    if ! $interrupted; then break; fi
  done
  # bash loses the code of a process that ends just as a signal arrives, and answers -1 for it
  if [ "$code" -lt 0 ]; then code=143; fi
  return "$code"
}

# Sleeps so many seconds, or until a signal.
nap() {
  sleep "$1" &
  napping=$!
  if ! $stopped; then wait_for "$napping" || true; fi
  napping=
}

# Runs a command to its end.
run_one() {
  local code=0
  "$@" &
  running=("$!")
  wait_for "$!" || code=$?
  running=()
  return "$code"
}

# run_logged FILE COMMAND ...: the same; what it says as errors goes to the file, and is shown.
run_logged() {
  local said=$1 code=0 shown
  shift
  : >"$said"
  "$@" 2>>"$said" &
  running=("$!")
  # a pipe would stay open as long as a grandchild lives
  tail -n +1 -s "${UAE_LOOK:-1}" -f --pid="$!" "$said" >&2 &
  shown=$!
  wait_for "${running[0]}" || code=$?
  running=()
  wait_for "$shown" || true
  return "$code"
}

most_lines=0 seen="" fruitless=0
elsewhere=0 # the code that another host has ended the run with

# Whether a work folder has more lines of metrics than ever, or a checkpoint that was not there; remembers both.
# A run that ends before its next checkpoint writes the same lines again: those are no progress.
progressed() {
  local folder=$1 lines=0 path more=false
  if [ -r "$folder/metrics.jsonl" ]; then lines=$(wc -l <"$folder/metrics.jsonl"); fi
  if [ "$lines" -gt "$most_lines" ]; then most_lines=$lines more=true; fi
  for path in "$folder"/checkpoints/*/*/; do
    if [[ $path =~ /([^/]+/[0-9]+)/$ ]] && [[ ",$seen," != *",${BASH_REMATCH[1]},"* ]]; then
      seen+=,${BASH_REMATCH[1]} more=true
    fi
  done
  $more
}

# begin WORKDIR [FILE]: what there is before the first start, or what the file remembers of earlier starts.
begin() {
  if [ -n "${2:-}" ] && [ -r "$2" ]; then read -r fruitless most_lines seen <"$2" || true; fi
  if ! [[ $fruitless =~ ^[0-9]+$ && $most_lines =~ ^[0-9]+$ ]]; then fruitless=0 most_lines=0; fi
  if [ ! -r "${2:-/none}" ]; then progressed "$1" || true; fi
}

# may_start_again WORKDIR [FILE]: counts a start; fails, with a line, when too many in a row were in vain.
may_start_again() {
  if progressed "$1"; then fruitless=0; else fruitless=$((fruitless + 1)); fi
  if [ "$fruitless" -gt "$retries" ]; then
    say "started $fruitless times without a new line of metrics or a new checkpoint in $1; it is not started again (UAE_RETRIES=$retries); see the errors above"
    if [ -n "${2:-}" ]; then rm -f "$2"; fi
    return 1
  fi
  # the folder of the file is made by the run itself
  if [ -n "${2:-}" ] && [ -d "$(dirname "$2")" ]; then echo "$fruitless $most_lines $seen" >"$2"; fi
}

# The wait before the next start, in seconds.
wait_before() {
  local seconds=$first_wait turn
  for ((turn = 1; turn < fruitless; turn++)); do seconds=$((seconds * 2)); done
  echo $((seconds < longest_wait ? seconds : longest_wait))
}

# supervise WORKDIR FILE_OF_COUNTS FILE_OF_WORDS COMMAND ...: runs a command until it is done, in error, stopped, or in vain.
# FILE_OF_COUNTS remembers the starts. FILE_OF_WORDS is where COMMAND leaves what it said. Both may be empty.
# Before each new start it asks `ended_elsewhere`, where the launcher has that function: another host may have ended the run.
supervise() {
  local workdir=$1 counts=$2 said=$3 code seconds
  shift 3
  begin "$workdir" "$counts"
  while true; do
    code=0
    if $stopped; then return 143; fi
    "$@" || code=$?
    if $stopped; then return "$code"; fi
    case $(verdict "$code" "$said") in
      done | stop)
        if [ -n "$counts" ]; then rm -f "$counts"; fi
        return "$code"
        ;;
    esac
    if ! may_start_again "$workdir" "$counts"; then return "$GIVEN_UP"; fi
    seconds=$(wait_before)
    say "the run ended ($(meaning "$code")); it is started again in $seconds s, from its newest checkpoint"
    nap "$seconds"
    if $stopped; then return "$code"; fi
    if declare -F ended_elsewhere >/dev/null && ended_elsewhere; then return "$elsewhere"; fi
  done
}
