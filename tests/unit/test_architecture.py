"""The shape of the package: imports point left, rooms stay readable, words that must not appear do not."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slow import SLOW, is_slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room imports from itself and from rows above its own; the map is in CONTRIBUTING.md.
LAYERS = [
    "system",
    "config",
    "ops",
    "models",
    "parallel",
    "data",
    "towers",
    "losses",
    "distill",
    "planning",
    "evaluation",
    "export",
    "federation",
    "serving",
    "report",
    "mixed_precision",
    "objectives",
    "training",
    "sweep",
    "migration",
    "commands",
    "cli",
    "train",
]
LEVEL = {room: level for level, room in enumerate(LAYERS)}
LEVEL |= {"__init__": LEVEL["commands"], "__main__": LEVEL["train"]}
FRONT_DOORS = {"commands", "cli", "train", "__init__"}


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


def test_every_room_has_its_place_in_the_layers():
    assert not {room_of(module) for module in MODULES} - LEVEL.keys()


def test_imports_point_left():
    wrong = [
        f"{module.relative_to(PACKAGE)}:{line}: {room_of(module)} imports {room}"
        for module in MODULES
        for line, room in imported_rooms(module)
        if room != room_of(module) and LEVEL[room] >= LEVEL[room_of(module)]
    ]
    assert not wrong


def test_contributing_lists_these_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("Imports point left only")[2]
    assert re.findall(r"`(\w+)`", text.partition("\n\n")[0].partition("\n")[2]) == LAYERS


def test_only_commands_and_sweeps_import_training():
    others = [module for module in MODULES if room_of(module) not in FRONT_DOORS | {"training"}]
    assert not [module for module in others if "training" in {room for _, room in imported_rooms(module)}]


def test_files_and_functions_stay_readable():
    long = []
    for module in MODULES:
        text = module.read_text()
        if len(text.splitlines()) > 400:
            long.append(f"{module.relative_to(PACKAGE)}: {len(text.splitlines())} lines")
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (function.end_lineno or function.lineno) - function.lineno + 1
                if length > 60:
                    long.append(f"{module.relative_to(PACKAGE)}:{function.lineno}: {function.name}: {length} lines")
    assert not long


def test_functions_take_five_positional_parameters_at_most():
    wide = []
    for module in MODULES:
        for function in ast.walk(ast.parse(module.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                if "triton.jit" in map(ast.unparse, function.decorator_list):
                    continue  # Triton has no keyword-only parameters
                names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > 5:
                    wide.append(f"{module.relative_to(PACKAGE)}:{function.lineno}: {function.name}")
    assert not wide


def test_the_root_of_the_package_holds_four_files_and_rooms():
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "train.py"}
    assert not [module for module in MODULES if module.stem.endswith("_command")]


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
    calls = re.compile(r"hydra\.utils\.|import instantiate|\bpickle\.loads?\(|\btorch\.load\((?!.*weights_only=True)")
    remote = re.compile(r"trust_remote_code\s*=\s*(?!False)")
    found = [m.name for m in MODULES if calls.search(m.read_text()) or remote.search(m.read_text())]
    # The tokenizing processes and their parent speak pickle over pipes that nobody else can write to.
    assert found == ["encode.py"]


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


def test_every_slow_test_exists_and_names_a_fast_one():
    def is_there(node: str) -> bool:
        file, _, test = node.partition("::")
        text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        return f"def {test.partition('[')[0]}(" in text if test else bool(text)

    assert not [node for pair in SLOW.items() for node in pair if not is_there(node)]
    assert not [fast for fast in SLOW.values() if is_slow(fast)]
