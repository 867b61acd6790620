#!/usr/bin/env bash
# Under MPI, with its options before --:  launchers/mpi.sh [OPTIONS OF MPIRUN] -- COMMAND [ARGUMENTS ...]
# for example  launchers/mpi.sh --host node1:4,node2:4 -- train gpt2_small output=/shared/gpt2
#
# Ranks meet where rank 0 says. More ranks than cores: --oversubscribe. DS_PRETRAIN_ENV=FILE: variables to set on every machine.
set -euo pipefail
options=()
while [[ "${1---}" != "--" ]]; do
  options+=("$1")
  shift
done
shift || { sed -n '2,3p' "$0" >&2; exit 2; }
command -v mpirun >/dev/null || { echo "no mpirun here: load your cluster's MPI, or pip install -e '.[mpi]'" >&2; exit 2; }
source "$(dirname "$0")/env.sh"
for name in $(passed_on); do
  options+=(-x "$name")
done
[[ -t 1 ]] || options+=(-x TERM=dumb) # a rank has a terminal even where mpirun writes a file: no bars in a log
rank=()
if [[ -n "${DS_PRETRAIN_LOGS:-}" ]]; then # mpirun's own logs are another option in every version
  mkdir -p "$DS_PRETRAIN_LOGS"
  rank=(bash -c 'exec "$@" > >(exec tee -a "$0/rank-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}.out") 2>&1' "$DS_PRETRAIN_LOGS")
fi
exec mpirun "${options[@]}" "${rank[@]}" "$(command -v python)" -m mpi4py -m ds_pretrain "$@"
