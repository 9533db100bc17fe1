#!/usr/bin/env bash
# Set up the project's Python environment, and print the path of its Python.
#   bash launch/setup.sh
# Default: .venv at the top of the checkout, with exactly the versions of constraints.txt.
# FINETUNE_PYTHON=/path/to/python: use that Python instead of .venv, and install only missing packages.
# A second call installs nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '%s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null && is_new_enough "$name"; then command -v "$name"; return; fi
  done
  say "error: no Python 3.11 or newer on PATH (python3 is $(python3 --version 2>&1 || true))."
  say "help: install one, or set its path: FINETUNE_PYTHON=/path/to/python3.12 bash launch/setup.sh"
  return 2
}

# Print missing packages, one per line. $2 = pinned: require exactly the versions of constraints.txt.
missing() {
  (cd / && "$1" - "$root" "${2-}") <<'PY'
import importlib.metadata as metadata, importlib.util, pathlib, sys, tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit(print("everything in constraints.txt"))
root, pinned = pathlib.Path(sys.argv[1]), sys.argv[2] == "pinned"
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
pins = [Requirement(line) for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
exact = {pin.name.lower().replace("_", "-"): pin.specifier for pin in pins} if pinned else {}
for requirement in wanted:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        print(requirement); continue
    specifier = requirement.specifier & exact.get(requirement.name.lower().replace("_", "-"), "")
    if not specifier.contains(found, prereleases=True):
        print(f"{requirement.name}{specifier} (found {found})")
spec = importlib.util.find_spec("finetune")
if spec is None or spec.origin is None or pathlib.Path(spec.origin).parent != root / "finetune":
    print(f"{project['name']} from this checkout")
PY
}

if [[ -n ${FINETUNE_PYTHON-} ]]; then
  python=$(command -v "$FINETUNE_PYTHON") || { say "error: FINETUNE_PYTHON=$FINETUNE_PYTHON is not an executable Python"; exit 2; }
  is_new_enough "$python" || { say "error: FINETUNE_PYTHON=$python is $("$python" --version 2>&1); Python 3.11 or newer is needed"; exit 2; }
  lacking=$(missing "$python")
else
  python=$root/.venv/bin/python
  if ! is_new_enough "$python"; then
    base=$(find_python)
    say "Creating .venv with $("$base" --version) …"
    "$base" -m venv --clear "$root/.venv" >&2
  fi
  lacking=$(missing "$python" pinned)
fi

if [[ -n $lacking ]]; then
  say "Installing into $("$python" -c 'import sys; print(sys.prefix)'), which can take a few minutes: ${lacking//$'\n'/, }"
  "$python" -m pip install --disable-pip-version-check --quiet --editable "$root[dev]" --constraint "$root/constraints.txt" >&2
fi
printf '%s\n' "$python"
