# shellcheck shell=bash
# Read by the scripts beside it: settings of XLA and NCCL for NVIDIA cards, and checks of a host before a run on them.

DRIVER_MAJOR=580 # the oldest driver of CUDA 13
CAPABILITY=7.5   # the oldest compute capability of CUDA 13
# where the checks look, so that tests can point them elsewhere
shm=${UAE_SHM:-/dev/shm}
infiniband=${UAE_INFINIBAND:-/sys/class/infiniband}
routes=${UAE_ROUTES:-/proc/net/route}
driver_mount=${UAE_DRIVER_MOUNT:-/usr/local/nvidia}

refuse() {
  echo "$(basename "$0") on ${HOSTNAME:-this host}: $1" >&2
  exit 2
}

caution() {
  echo "$(basename "$0") on ${HOSTNAME:-this host}: warning: $1" >&2
}

# Whether JAX_PLATFORMS leaves the cards to JAX.
cards_wanted() {
  [[ -z ${JAX_PLATFORMS:-} || $JAX_PLATFORMS == *cuda* || $JAX_PLATFORMS == *gpu* ]]
}

# GKE mounts the driver into every pod, and leaves the search paths to the image.
find_driver() {
  if ! command -v nvidia-smi >/dev/null 2>&1 && [ -x "$driver_mount/bin/nvidia-smi" ]; then
    export PATH=$PATH:$driver_mount/bin LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$driver_mount/lib64
  fi
}

# add_flag NAME VALUE: a flag that the user has set already stays as it is.
add_flag() {
  if ! [[ ${XLA_FLAGS:-} =~ (^|[[:space:]])--$1([=[:space:]]|$) ]]; then XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--$1=$2"; fi
}

# Exports the settings; both jax 0.10.2 and 0.12 know every flag, and an unknown one would end the process.
# CUDA graphs need no flag: XLA records kernels that follow each other, such as those of a decoded layer, by default.
gpu_flags() {
  local name
  # XLA reads a value without a dash as the name of a file of flags; nothing can be added to it here
  if [[ -z ${XLA_FLAGS:-} || $XLA_FLAGS =~ ^[[:space:]]*- ]]; then
    # collectives start early and end late, with products in between
    add_flag xla_gpu_enable_latency_hiding_scheduler true
    # 128 MiB instead of 30: fewer and larger gathers
    for name in all_gather reduce_scatter all_reduce; do add_flag "xla_gpu_${name}_combine_threshold_bytes" 134217728; done
    # hosts finish compiling at different times, and the default ends those that wait for 40 seconds
    add_flag xla_gpu_first_collective_call_terminate_timeout_seconds 600
    export XLA_FLAGS
  fi
  # the share that uae_jax.plan counts on; XLA's default is 0.75. Its older name still works, but both together are an error
  if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.92}; fi
  # NCCL then names the cause of a failure, which XLA reports as a system error
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

# The settings as a comment for dry runs.
show_flags() {
  local fraction=${XLA_CLIENT_MEM_FRACTION:+XLA_CLIENT_MEM_FRACTION=$XLA_CLIENT_MEM_FRACTION }
  echo "# with ${fraction}NCCL_DEBUG=$NCCL_DEBUG XLA_FLAGS=$(printf %q "$XLA_FLAGS")"
}

# How many processes of this run share this host, by what SLURM or MPI says.
processes_here() {
  local tasks=${SLURM_STEP_TASKS_PER_NODE:-${OMPI_COMM_WORLD_LOCAL_SIZE:-1}}
  tasks=${tasks%%[(,]*} # SLURM writes 8(x2) for two nodes of eight
  echo "${tasks:-1}"
}

# On how many hosts the run is, by what SLURM, xpk or MPI says.
hosts_of_run() {
  local each=${OMPI_COMM_WORLD_LOCAL_SIZE:-1}
  echo "${SLURM_STEP_NUM_NODES:-${NNODES:-$((${OMPI_COMM_WORLD_SIZE:-1} / each))}}"
}

# gpu_checks PROCESSES_HERE HOSTS: ends with code 2 and one line where a run would fail later, and less clearly.
gpu_checks() {
  local processes=${1:-1} hosts=${2:-1} cards
  if [ "${UAE_GPU_CHECKS:-on}" = off ]; then return; fi
  _check_cards
  _check_count
  if [ "$cards" -gt 1 ]; then _check_shared_memory; fi
  if [ "$hosts" -gt 1 ]; then _check_network; fi
}

# Driver and kind of the cards; sets `cards`, the number that CUDA sees.
_check_cards() {
  local query=--query-gpu=driver_version,name,compute_cap format=--format=csv,noheader rows driver name capability old="" known=0 unfit=0
  # drivers before 510 do not know the field compute_cap
  if ! rows=$(nvidia-smi "$query" "$format" 2>/dev/null) && ! rows=$(nvidia-smi "${query%,*}" "$format" 2>/dev/null); then
    refuse "nvidia-smi finds no driver; install NVIDIA's driver $DRIVER_MAJOR or newer, or start the container with --gpus all (JAX_PLATFORMS=cpu runs without cards)"
  fi
  while IFS=, read -r driver name capability; do
    name=${name# } capability=${capability# }
    if ! [[ $driver =~ ^[0-9]+\. ]]; then continue; fi
    known=$((known + 1))
    if [ "${driver%%.*}" -lt $DRIVER_MAJOR ]; then
      refuse "the driver is $driver and CUDA 13 needs $DRIVER_MAJOR or newer; update it (UAE_GPU_CHECKS=off where a compatibility package stands in)"
    fi
    if [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] && [ "${capability//./}" -lt "${CAPABILITY//./}" ]; then
      unfit=$((unfit + 1)) old="$name has compute capability $capability"
    fi
  done <<<"$rows"
  if [ "$known" -eq 0 ]; then refuse "nvidia-smi lists no card; start the container with --gpus all, or ask the cluster for cards"; fi
  if [ "$unfit" -gt 0 ] && { [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || [ "$unfit" -eq "$known" ]; }; then
    refuse "$old and the CUDA 13 wheels need $CAPABILITY or newer; leave it out with CUDA_VISIBLE_DEVICES, use a newer card, or set JAX_PLATFORMS=cpu"
  fi
  cards=$known
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    local seen=()
    IFS=, read -r -a seen <<<"$CUDA_VISIBLE_DEVICES"
    cards=${#seen[@]}
    for name in "${seen[@]}"; do
      if [[ $name =~ ^[0-9]+$ ]] && [ "$name" -ge "$known" ]; then
        refuse "CUDA_VISIBLE_DEVICES names card $name and this host has $known, counted from 0; name those that are there"
      fi
    done
    # CUDA stops at the first name that is no card
    if [[ $CUDA_VISIBLE_DEVICES == -* || $CUDA_VISIBLE_DEVICES == NoDevFiles ]]; then cards=0; fi
  fi
}

_check_count() {
  local ids=() id
  if [ "$cards" -eq 0 ]; then refuse "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', which hides every card; unset it, or set JAX_PLATFORMS=cpu"; fi
  if [ "$processes" -gt "$cards" ]; then
    refuse "$processes processes need a card each and CUDA sees $cards; start $cards, or ask for more cards (SLURM: --gpus-per-node, without --gpus-per-task)"
  fi
  IFS=, read -r -a ids <<<"${JAX_LOCAL_DEVICE_IDS:-}"
  for id in "${ids[@]}"; do
    if ! [[ $id =~ ^[0-9]+$ ]]; then refuse "JAX_LOCAL_DEVICE_IDS is '$JAX_LOCAL_DEVICE_IDS'; give numbers of cards, separated by commas"; fi
    if [ "$id" -ge "$cards" ]; then refuse "JAX_LOCAL_DEVICE_IDS names card $id and CUDA sees $cards, counted from 0; name those that are there"; fi
  done
}

# NCCL keeps buffers between the cards of a host there; the 64 MiB that docker gives by default are too few.
_check_shared_memory() {
  local need=$((cards * 64)) free
  if [ "$need" -lt 512 ]; then need=512; fi
  read -r _ _ _ free _ < <(df -Pk "$shm" 2>/dev/null | tail -n 1) || true
  free=$((${free:-0} / 1024))
  if [ "$free" -lt "$need" ]; then
    refuse "$shm has $free MiB free and NCCL needs $need MiB for $cards cards; start the container with --shm-size=$((2 * need))m or --ipc=host (on a host: mount -o remount,size=$((2 * need))m $shm)"
  fi
}

# Slow or wrong paths between hosts: a run may still work, so these are warnings.
_check_network() {
  local limit interface="" name destination
  limit=$(ulimit -l)
  if [ "$limit" != unlimited ] && [ -n "$(ls -A "$infiniband" 2>/dev/null)" ]; then
    caution "only $limit KiB may be locked in memory and InfiniBand needs more; start the container with --ulimit memlock=-1, or raise memlock in limits.conf"
  fi
  if [ -n "${NCCL_SOCKET_IFNAME:-}" ] || [ ! -r "$routes" ]; then return; fi
  while read -r name destination _; do
    if [ "$destination" = 00000000 ]; then interface=$name && break; fi
  done <"$routes"
  case ${interface:-none} in
    none | lo | docker* | br-* | virbr* | veth*)
      caution "the default route is by ${interface:-no interface}, where other hosts may not answer; set NCCL_SOCKET_IFNAME to the network between the hosts"
      ;;
  esac
}
