#!/usr/bin/env bash
# Train with one process per GPU of this machine. If one fails, all start again from the last checkpoint, three times:
#   bash launch/torchrun/train.sh config=lora.yaml data.train=rows.jsonl
# Several machines: run it on each, with output_dir in a folder that all of them see. The first of two:
#   PET_NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=host0 bash launch/torchrun/train.sh config=lora.yaml data.train=rows.jsonl
# torchrun reads every option from a variable PET_<OPTION>; launch/slurm and launch/skypilot set these and run this file.
# Without GPUs: PET_NPROC_PER_NODE=2.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh")
export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-gpu}
# The first machine serves the rendezvous, at which machines meet again after a restart. On one machine: any free port.
if ((${PET_NNODES:-1} == 1)); then
  export PET_RDZV_ENDPOINT=localhost:0
else
  export PET_RDZV_ENDPOINT=${PET_MASTER_ADDR:?names the first machine}:${PET_MASTER_PORT:-29500}
  PET_RDZV_CONF=is_host=$((PET_NODE_RANK == 0)),join_timeout=1800
  export PET_RDZV_CONF
fi

# A stopped run finishes its step and saves a checkpoint: torchrun kills it after 240 s, its default is 30 s.
exec "$python" -m torch.distributed.run --rdzv-backend=c10d --rdzv-id=finetune --max-restarts=3 --shutdown-timeout=240 \
  "$here/../../finetune/train.py" "$@" train.resume=auto
