#!/usr/bin/env bash
# Several machines over ssh, by deepspeed and pdsh:  launchers/hostfile.sh HOSTFILE COMMAND [ARGUMENTS ...]
# for example  launchers/hostfile.sh hosts.txt train gpt2_small output=/shared/gpt2
#
# HOSTFILE has a line for each machine, "node1 slots=8": its name and its ranks. Each machine has the project and its .venv at the
# same path and lets this one in by key. MASTER_ADDR, MASTER_PORT: where to meet, else the first machine's first address.
# DS_PRETRAIN_ENV=FILE: variables to set on every machine.
set -euo pipefail
hosts=${1:?a hostfile, then the command}
shift
source "$(dirname "$0")/env.sh"
[[ -r "$hosts" ]] || { echo "no hostfile $hosts: lines such as \`host1 slots=8\`" >&2; exit 2; } # deepspeed would train here alone
mapfile -t names < <(awk 'NF && $1 !~ /^#/ {print $1}' "$hosts")
if ((${#names[@]} > 1)); then
  login=(timeout 30 ssh -n -o BatchMode=yes -o ConnectTimeout=10 ${PDSH_SSH_ARGS_APPEND:-})
  gone=$(for name in "${names[@]}"; do ("${login[@]}" "$name" true >/dev/null 2>&1 || echo "$name") & done; wait)
  if [[ -n "$gone" ]]; then
    echo "no ssh to" $gone "of $hosts: is it up, does \`ssh HOST true\` work without a password? Else take it out of the file" >&2
    exit 2
  fi
  export MASTER_ADDR=${MASTER_ADDR:-$(interface_address "$(command -v python)" "${login[@]}" "${names[0]}")}
fi
variables=$(mktemp)
trap 'rm -f "$variables"' EXIT
for name in $(passed_on); do
  echo "$name=${!name}"
done > "$variables"
# a machine that is gone ends the job after a minute, not when TCP gives up
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=15 -o ServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"
[[ -z "${DS_PRETRAIN_LOGS:-}" ]] || mkdir -p "$DS_PRETRAIN_LOGS"
DS_ENV_FILE=$variables deepspeed --hostfile "$hosts" --launcher pdsh ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
  ${MASTER_PORT:+--master_port "$MASTER_PORT"} ${DS_PRETRAIN_LOGS:+--enable_each_rank_log "$DS_PRETRAIN_LOGS"} --module ds_pretrain "$@"
