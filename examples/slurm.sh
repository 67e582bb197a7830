#!/bin/bash
# Run a scenario on several hosts under Slurm: one task per host, in which torchrun starts the ranks of this host.
#
#   sbatch examples/slurm.sh metadata_rebuild fault
#
# The repository and the output folder must be on a file system that all hosts see: rank 0 makes the run directory
# there, and the ranks of every host write their witnesses into it. On every other host an agent takes stacks and Flight
# Recorder dumps of the ranks. This script was written from Slurm's documentation, and not run on a cluster.
#
#SBATCH --job-name=ep-hang
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.log
set -euo pipefail

scenario=${1:-metadata_rebuild}
variant=${2:-fault}
ranks_per_host=${RANKS_PER_HOST:-8}
out=${OUT:-$PWD/runs}

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# If gloo chooses the wrong network interface, name the right one: export GLOO_SOCKET_IFNAME=ib0
export PYTHONUNBUFFERED=1

srun --kill-on-bad-exit=0 .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_host" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$first_host:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m repro.worker "$scenario" --variant "$variant" --backend "${BACKEND:-nccl}" --out "$out" || true

# Ranks that hang are ended, so their exit code says nothing: read the verdict in the newest run directory. If `watch` exits
# with 1 (unexpected verdict) or 125 (no verdict), the bundle is needed most, so this script goes on.
code=0
.venv/bin/python -m repro watch "$out/latest" || code=$?
.venv/bin/python -m repro bundle "$out/latest"
exit "$code"
