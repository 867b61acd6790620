# The life of a SLURM job, sourced by the batch scripts:  run_job PROGRAM ...  runs it on all tasks, then ends or requeues the job.
#
# Before its limit and before a pre-emption the batch shell gets USR1 and passes it on: the ranks save and end, the job goes back
# into the queue. After a failure, of saving too, it does so if `ds_pretrain restart` says so. SIGTERM is scancel: never back from
# that.
arguments=("$@") # of the batch script
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # of one task of an array SLURM_JOB_ID is the whole array's
job=${job:-$SLURM_JOB_ID}
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not ask for what sbatch was asked for
if ((${SLURM_NNODES:-1} > 1)); then # ranks meet at the chosen interface of this node, the first
  export MASTER_ADDR=${MASTER_ADDR:-$(interface_address python ${DS_PRETRAIN_EXEC:-} bash -c)}
fi

run_job() {
  local again="" cancelled="" code=0 logs=() pid
  if [[ -n "${DS_PRETRAIN_LOGS:-}" ]]; then
    mkdir -p "$DS_PRETRAIN_LOGS"
    logs=(--output "$DS_PRETRAIN_LOGS/%x-%j-task%t.out" --open-mode append)
  fi
  trap 'again=yes; scancel --signal=USR1 "$job" || true' USR1 # reaches the tasks, not this shell
  trap 'cancelled=yes' TERM
  srun --kill-on-bad-exit=1 --wait=60 "${logs[@]}" "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # which a trapped signal ends early
  done
  wait "$pid" || code=$?
  if [[ -n "$cancelled" ]]; then
    exit 143
  fi
  if ((code)); then
    ${DS_PRETRAIN_EXEC:-} python -m ds_pretrain restart ${again:+--signalled} "$code" "${arguments[@]}" && again=yes || again=""
  fi
  if [[ -n "$again" ]]; then
    [[ -n "$cancelled" ]] || scontrol requeue "$job"
  fi
  exit "$code"
}
