#!/usr/bin/env bash
# Under Open MPI, with its options before --:  launchers/mpi.sh [OPTIONS OF MPIRUN] -- COMMAND [ARGUMENTS ...]
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
source "$(dirname "$0")/env.sh"
if ! mpirun --version 2>/dev/null | grep -q "Open MPI"; then
  echo "no mpirun of Open MPI here: load your cluster's, or pip install -e '.[mpi]'; under another MPI start by srun or hostfile.sh" >&2
  exit 2
fi
for name in $(passed_on); do
  options+=(-x "$name")
done
[[ -t 1 ]] || options+=(-x TERM=dumb) # a rank has a terminal even where mpirun writes a file: no bars in a log
rank=()
if [[ -n "${DS_PRETRAIN_LOGS:-}" ]]; then # mpirun's own logs are another option in every version
  mkdir -p "$DS_PRETRAIN_LOGS"
  # signals reach all processes of a rank: they are for python, and what it says then is to be read
  rank=(bash -c 'exec "$@" > >(trap "" HUP INT TERM USR1; exec tee -a "$0/rank-$OMPI_COMM_WORLD_RANK.out") 2>&1' "$DS_PRETRAIN_LOGS")
fi
exec mpirun "${options[@]}" "${rank[@]}" "$(command -v python)" -m mpi4py -m ds_pretrain "$@"
