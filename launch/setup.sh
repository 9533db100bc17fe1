#!/usr/bin/env bash
# Set up the project's Python environment, and print the path of its Python.
#   bash launch/setup.sh              what a run needs
#   bash launch/setup.sh export dev   and the named groups of pyproject.toml; dev is what tests and site need
# Default: .venv at the top of the checkout, with exactly the versions of constraints.txt.
# FINETUNE_PYTHON=/path/to/python: use that Python instead of .venv, and install only missing packages.
# uv installs where it is on PATH, pip elsewhere. A call installs what is missing; the next one installs nothing.
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

# Print missing packages, one per line. $2 = pinned: require exactly the versions of constraints.txt. Then groups.
missing() {
  (cd / && "$1" - "$root" "${@:2}") <<'PY'
import importlib.metadata as metadata, importlib.util, pathlib, sys, tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit(print("everything in constraints.txt"))
if other := next(iter(metadata.distributions(name="finetune")), None):
    sys.exit(f"error: finetune {other.version}, another project, is installed in {sys.prefix} and hides this one\n"
             f"help: {sys.executable} -m pip uninstall finetune")
root, pinned, groups = pathlib.Path(sys.argv[1]), sys.argv[2] == "pinned", sys.argv[3:]
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
def expand(lines):
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            yield from (each for group in requirement.extras for each in expand(extras[group]))
        else:
            yield requirement
wanted = list(expand(project["dependencies"] + [line for group in groups for line in extras[group]]))
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

install() {
  # Python compiles a module at its first import; pip would compile every one: 12 of 13 s for transformers and sympy.
  local pip=("$1" -m pip install --disable-pip-version-check --quiet --no-compile)
  if ! command -v uv >/dev/null; then "${pip[@]}" "${@:2}"; return; fi
  # pip's settings name the build of torch that fits this machine, and uv does not read them.
  if "$1" -m pip --version >/dev/null 2>&1; then "${pip[@]}" torch --constraint "$root/constraints.txt"; fi
  uv pip install --quiet --python "$1" "${@:2}"
}

if [[ -n ${FINETUNE_PYTHON-} ]]; then
  python=$(command -v "$FINETUNE_PYTHON") || { say "error: FINETUNE_PYTHON=$FINETUNE_PYTHON is not an executable Python"; exit 2; }
  is_new_enough "$python" || { say "error: FINETUNE_PYTHON=$python is $("$python" --version 2>&1); Python 3.11 or newer is needed"; exit 2; }
  lacking=$(missing "$python" any "$@")
else
  python=$root/.venv/bin/python
  if ! is_new_enough "$python"; then
    base=$(find_python)
    say "Creating .venv with $("$base" --version) …"
    "$base" -m venv --clear "$root/.venv" >&2
  fi
  lacking=$(missing "$python" pinned "$@")
fi

if [[ -n $lacking ]]; then
  say "Installing into $("$python" -c 'import sys; print(sys.prefix)'), which can take a few minutes: ${lacking//$'\n'/, }"
  groups=$(IFS=,; printf '%s' "$*")
  install "$python" --editable "$root${groups:+[$groups]}" --constraint "$root/constraints.txt" >&2
fi
printf '%s\n' "$python"
