#!/usr/bin/env bash
# Set up the environment (once), then fine-tune the packaged tiny base in 4 bit on the sample data.
# It needs no hub, no GPU and no account, and writes to outputs/quickstart in the current folder, then outputs/quickstart-2 ….
#   bash launch/quickstart.sh [key=value …]
#   bash launch/quickstart.sh train.max_steps=20 lora.rank=16
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/launch/setup.sh")

exec "$python" -m accelerate.commands.launch --quiet --config_file "$root/launch/accelerate/one.yaml" \
  "$root/finetune/train.py" config=quickstart.yaml "$@"
