#!/usr/bin/env bash
# All devices of this machine, or N processes on CPU:  launchers/local.sh [-n N] COMMAND [ARGUMENTS ...]
# for example  launchers/local.sh -n 2 train quickstart parallel.tensor=2
set -euo pipefail
n=""
if [[ "${1:-}" == "-n" ]]; then
  n=${2:?how many processes?}
  shift 2
fi
source "$(dirname "$0")/env.sh"
if [[ -z "$n" ]]; then
  n=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
exec torchrun --standalone --nproc_per_node "$((n > 0 ? n : 1))" ${DS_PRETRAIN_LOGS:+--log-dir "$DS_PRETRAIN_LOGS" --tee 3} -m ds_pretrain "$@"
