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

# Prints the IPv4 address of DS_PRETRAIN_INTERFACE; nothing where none is chosen, nor where it has none, which the ranks tell.
interface_address() { # PYTHON COMMAND ...: the command runs a line of shell where the interface is, as `bash -c` and `ssh HOST` do
  local found code="from ds_pretrain.parallel.launch import address_of; print(address_of('${DS_PRETRAIN_INTERFACE:-}'))"
  [[ -n "${DS_PRETRAIN_INTERFACE:-}" ]] || return 0
  found=$("${@:2}" "cd $(printf %q "$PWD") && $1 -c \"$code\"" 2>/dev/null) || return 0
  echo "${found##*$'\n'}" # a shell may greet whoever logs in
}

# The names of the variables that every rank gets, on whatever machine: those of the file, and what libraries are set up by.
passed_on() {
  [[ -z "${DS_PRETRAIN_ENV:-}" ]] || sed -nE 's/^(export )?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$DS_PRETRAIN_ENV"
  compgen -e | grep -E '^(OMP_NUM_THREADS|MASTER_(ADDR|PORT)|PYTHON[A-Z]+|CUDA_DEVICE_MAX_CONNECTIONS|(TORCH_)?NCCL_.*|GLOO_.*|DS_(PRETRAIN|ACCELERATOR).*|HF_.*)$'
}
