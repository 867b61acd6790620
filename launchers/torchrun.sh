#!/usr/bin/env bash
# The ranks of this node, for slurm_torchrun.sbatch, which starts it once on each.
set -euo pipefail
source launchers/env.sh
trap "" USR1 # is for the ranks: torchrun would die of it, and they with it
address=$(interface_address python bash -c)
# torchrun knows the first node by its name alone, not by the address of another interface
exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$DS_PRETRAIN_RANKS" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
  --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-conf "is_host=$((SLURM_NODEID == 0))" ${address:+--local-addr "$address"} \
  ${DS_PRETRAIN_LOGS:+--log-dir "$DS_PRETRAIN_LOGS/node-$SLURM_NODEID" --tee 3} -m ds_pretrain "$@"
