#!/usr/bin/env bash
# Two processes over gloo without a GPU: tries the distributed path on any machine.
#   training/launch/two_cpu.sh shapes-dpo output_dir=out/two
# torchrun, because `accelerate launch` starts CPU processes through MPI only.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m torch.distributed.run --standalone --nproc_per_node=2 training/train.py "$@"
