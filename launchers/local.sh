#!/usr/bin/env bash
# All devices of this machine, or N processes on CPU:  launchers/local.sh [-n N] COMMAND [ARGUMENTS ...]
# for example  launchers/local.sh -n 2 train quickstart parallel.tensor=2
set -euo pipefail
n=""
if [[ "${1:-}" == "-n" ]]; then
  n=${2:?how many processes?}
  shift 2
fi
if [[ -z "$n" ]]; then
  n=$(nvidia-smi -L 2>/dev/null | wc -l || true)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc_per_node "$((n > 0 ? n : 1))" -m ds_pretrain "$@"
