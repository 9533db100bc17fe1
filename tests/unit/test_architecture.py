"""The shape of the package: imports point left, rooms stay readable, words that must not appear do not."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room imports from itself and from rows above its own; the map is in CONTRIBUTING.md.
LAYERS = [
    {"errors"},
    {"arguments", "files", "heap", "resources", "terminal"},
    {"plotting"},
    {"config", "ops"},
    {"models", "data"},
    {"losses", "planning"},
    {"distill"},
    {"evaluation"},
    {"export"},
    {"gap", "precision", "report"},
    {"sweeping"},
    {"training"},
    {
        "allocate_command",
        "chat",
        "cache_command",
        "compare_command",
        "data_command",
        "data_convert",
        "doctor",
        "eval_command",
        "export_command",
        "merge_command",
        "plan_command",
        "sensitivity_command",
        "sweep_command",
        "__init__",
    },
    {"cli"},
    {"train"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FRONT_DOORS = {"cli", "train", "__init__"}


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of everything the file imports from the package, inside functions and for types too."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "finetune":
                names = [f"finetune.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "finetune" and rest and not rest.startswith("_"):
                yield node.lineno, rest.split(".")[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(module: Path):
    here = room_of(module)
    assert here in LEVEL, f"{here} has no place in the layers; give it one here and in CONTRIBUTING.md"
    wrong = [
        f"line {line}: {here} imports {room}"
        for line, room in imported_rooms(module)
        if room != here and LEVEL[room] >= LEVEL[here]
    ]
    assert not wrong


def test_contributors_are_told_these_layers():
    told = (ROOT / "CONTRIBUTING.md").read_text().partition("Imports point left only")[2].partition("\n\n")[0]
    listed = [set(group.split(", ")) for group in re.findall(r"`([\w, ]+)`", told)]
    commands = next(rooms for rooms in LAYERS if "doctor" in rooms)
    assert listed == [rooms for rooms in LAYERS if rooms is not commands]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_front_doors_import_training(module: Path):
    if room_of(module) in FRONT_DOORS | {"training"}:
        return
    assert "training" not in {room for _, room in imported_rooms(module)}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(module: Path):
    text = module.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: length for f in functions if (length := (f.end_lineno or f.lineno) - f.lineno + 1) > 60}
    assert not long


def test_no_room_shadows_a_package_or_collects_leftovers():
    rooms = {room_of(module) for module in MODULES}
    assert not rooms & {"utils", "helpers", "kernels", "evaluate", "common", "misc"}


def test_nothing_swallows_every_error():
    silent = [
        f"{module}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
    ]
    assert not silent


def test_no_config_can_name_code_and_nothing_is_unpickled():
    calls = re.compile(r"hydra\.utils\.|import instantiate|\bpickle\.loads?\(|\btorch\.load\(")
    remote = re.compile(r"trust_remote_code\s*=\s*(?!False)")
    found = [m.name for m in MODULES if calls.search(m.read_text()) or remote.search(m.read_text())]
    # The tokenising processes and their parent speak pickle over pipes that nobody else can write to.
    assert found == ["workers.py"]


def test_no_file_names_a_package_host_a_home_path_or_unfinished_work():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs the git checkout to know which files are ours")
    hosts = re.compile(r"://[^/\s\"]*(py" + r"pi|python" + r"hosted|npm|debian)[^/\s\"]*\.(org|com)", re.IGNORECASE)
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
    home = re.compile(r"(?<![\w.])/(" + r"work|home/\w+|root|Users/\w+)/")
    found = []
    for name in tracked.stdout.splitlines():
        file = ROOT / name
        if file.suffix not in {".py", ".md", ".sh", ".yaml", ".toml", ".txt", ".ipynb", ".sbatch"} or not file.exists():
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if hosts.search(line) or home.search(line) or (file.suffix == ".py" and unfinished.search(line)):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found
