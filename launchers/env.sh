# What every launcher exports; sourced by them. A file named by DS_PRETRAIN_ENV (KEY=VALUE lines) comes first and wins.
if [[ -n "${DS_PRETRAIN_ENV:-}" ]]; then
  set -a
  source "$DS_PRETRAIN_ENV"
  set +a
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONFAULTHANDLER=1                                              # stacks of a rank that crashes
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}     # tensor parallelism overlaps only in this order
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# Ranks meet at the chosen interface of the first machine: this one, or the one that a command before leads to.
meet_at_interface() { # [ssh HOST]
  [[ -n "${DS_PRETRAIN_INTERFACE:-}" && -z "${MASTER_ADDR:-}" ]] || return 0
  MASTER_ADDR=$("$@" ip -4 -o addr show dev "$DS_PRETRAIN_INTERFACE" 2>/dev/null | awk '{split($4, a, "/"); print a[1]; exit}') || true
  if [[ -z "$MASTER_ADDR" ]]; then
    echo "DS_PRETRAIN_INTERFACE is $DS_PRETRAIN_INTERFACE, but ${2:-$(hostname)} has no IPv4 address there: choose one of these" >&2
    "$@" ip -4 -br addr >&2 || true
    exit 2
  fi
  export MASTER_ADDR
}

# The names of the variables that every rank gets, on whatever machine: those of the file, and what libraries are set up by.
passed_on() {
  [[ -z "${DS_PRETRAIN_ENV:-}" ]] || sed -nE 's/^(export )?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$DS_PRETRAIN_ENV"
  compgen -e | grep -E '^(OMP_NUM_THREADS|MASTER_(ADDR|PORT)|PYTHON[A-Z]+|CUDA_DEVICE_MAX_CONNECTIONS|(TORCH_)?NCCL_.*|GLOO_.*|DS_(PRETRAIN|ACCELERATOR).*|HF_.*)$'
}
