#!/usr/bin/env bash
# One run on several machines, started by hand: the same line on each of them, with another NODE_RANK.
#
#   HEAD=node0:29500 NODES=2 NODE_RANK=0 GPUS=8 RUN=/shared/runs/mine launch/torchrun.sh --recipe base parallel.ep=8
#   HEAD=node0:29500 NODES=2 NODE_RANK=1 GPUS=8 RUN=/shared/runs/mine launch/torchrun.sh --recipe base parallel.ep=8
#
# HEAD: host:port of the first machine, which the others must reach. RUN: a folder that all machines see, where the
# checkpoints are. RESTARTS: how often all processes are started again after one of them has died; they go on from the
# newest checkpoint. PYTHON: the interpreter that has dsv4. DEVICE: cuda, or cpu to try it.
set -euo pipefail

# a new store at every start: torchrun's own, where the addresses of dead processes lie, is shared by all of them otherwise
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
: "${HEAD:?host:port of the first machine}" "${RUN:?a folder that all machines see}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-id "$(basename "$RUN")" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --max-restarts "${RESTARTS:-3}" \
    -m dsv4 train --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" --out "$RUN" --resume auto "$@"
