#!/usr/bin/env bash
# usage: serve.sh MERGED RUN ROWS.jsonl [key=value …]
# In the container of this folder: quantize a merged model to FP8, once; serve it; compare it with the run that it is from.
set -euo pipefail

if (($# < 3)); then
    echo "usage: serve.sh MERGED RUN ROWS.jsonl [key=value …]" >&2
    exit 2
fi
merged=${1%/} run=$2 rows=$3
shift 3
fp8=$merged-fp8

if [[ ! -d $fp8 ]]; then
    python3 "$(dirname "$0")/quantize.py" "$merged" "$rows" "$fp8"
fi
# The container publishes the port; from outside, 127.0.0.1 of the container cannot be reached.
exec finetune serve model="$fp8" serve.check="$run" engine=tensorrt_llm host=0.0.0.0 "$@"
