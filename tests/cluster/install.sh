#!/usr/bin/env bash
# What the tests of clusters need from Debian or Ubuntu, as root: hosts with ssh, pdsh and SLURM. No daemon is left running.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 pdsh slurm-wlm munge
