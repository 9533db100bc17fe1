#!/usr/bin/env bash
# Sets the environment up (once) and runs the tests.
#   bash launch/test.sh [pytest arguments]        for example: bash launch/test.sh tests/unit -k config
# A process a core, four at most, takes file after file, the slow ones of tests/integration before those of tests/unit;
# `-n 0` keeps all in one, as a debugger needs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/launch/setup.sh")
cd "$root"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
