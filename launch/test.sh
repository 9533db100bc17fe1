#!/usr/bin/env bash
# Set up the environment (once) and run the tests, without the slow ones of tests/slow.py.
#   bash launch/test.sh [pytest arguments]        for example: bash launch/test.sh tests/unit -k config
#   bash launch/test.sh -m "slow or not slow"     all tests, as .ci/run does
# One process per core, four at most. `-n 0` runs all tests in one process, for a debugger.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/launch/setup.sh" dev)
cd "$root"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
