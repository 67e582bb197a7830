#!/bin/bash
# A scenario on several hosts under Slurm: one task a host, torchrun starts the ranks of each.
#
#   sbatch examples/slurm.sh metadata_rebuild fault
#
# The repository and the output folder must be on a file system that all hosts see: rank 0 makes the run directory
# there, and the ranks of every host write their witnesses into it. Only the ranks of rank 0's host are asked for
# stacks and Flight Recorder dumps. Written for Slurm's documentation; not run on a cluster.
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

# The interface that hosts reach each other by, where gloo would pick another: export GLOO_SOCKET_IFNAME=ib0
export PYTHONUNBUFFERED=1

srun --kill-on-bad-exit=0 .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_host" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$first_host:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m repro.worker "$scenario" --variant "$variant" --backend "${BACKEND:-nccl}" --out "$out" || true

# The verdict is in the newest run directory, whatever the ranks' exit code was: they are ended when they hang.
# watch ends with 1 for an unexpected verdict and 125 for none; the bundle is wanted then most of all.
code=0
.venv/bin/python -m repro watch "$out/latest" || code=$?
.venv/bin/python -m repro bundle "$out/latest"
exit "$code"
