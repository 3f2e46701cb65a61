# shellcheck shell=bash
# Read by the scripts beside it: options, dry runs, errors. Options come before the positional arguments; what follows the
# positional arguments goes to uae_jax.main as it is.

dry_run=false
declare -A option=()
positional=()

fail() {
  echo "$(basename "$0"): $1; see --help" >&2
  exit 2
}

# read_options "NAMES WITH A VALUE" "NAMES WITHOUT" NUMBER_OF_POSITIONALS "$@"
read_options() {
  local valued=" $1 " plain=" dry-run $2 " wanted=$3 name
  shift 3
  while [ $# -gt 0 ] && [[ $1 == -* ]]; do
    name=${1#--}
    name=${name%%=*}
    if [[ $1 == -h || $1 == --help ]]; then
      usage
      exit 0
    elif [[ $1 == --* && $valued == *" $name "* ]]; then
      if [[ $1 == *=* ]]; then
        option[$name]=${1#*=}
      elif [ $# -gt 1 ]; then
        option[$name]=$2
        shift
      else
        fail "option --$name needs a value"
      fi
    elif [[ $1 == --* && $1 != *=* && $plain == *" $name "* ]]; then
      option[$name]=true
    else
      fail "unknown option $1"
    fi
    shift
  done
  if [ $# -lt "$wanted" ]; then fail "it needs $wanted arguments and got $#"; fi
  positional=("$@")
  local extra
  for extra in "${positional[@]:$wanted}"; do
    if [[ $extra != --* ]]; then fail "unexpected argument $extra"; fi
  done
  dry_run=${option[dry-run]:-false}
}

# Runs a command, or prints it, quoted, in a dry run.
do_it() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# A bucket's path gs://BUCKET/PATH as the path under which hosts mount it; anything else unchanged.
as_mounted() {
  printf '%s' "${1/gs:\/\///mnt/}"
}

# The buckets that some arguments name, one a line.
buckets_in() {
  printf '%s\n' "$@" | grep -o 'gs://[^/]*' | sed 's|gs://||' | sort -u || true
}

# A number that tells one command from another.
command_id() {
  printf '%q ' "$@" | cksum | cut -d ' ' -f 1
}
