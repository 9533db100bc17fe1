#!/usr/bin/env bash
# Sets the environment up (once) and runs the tests.
#   bash launch/test.sh [pytest arguments]        for example: bash launch/test.sh tests/unit -k config
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/launch/setup.sh")
cd "$root"
exec "$python" -m pytest "$@"
