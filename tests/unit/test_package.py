"""What `pip install .` gives: everything it needs, nothing it does not, from any folder."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import finetune
from finetune.system.libraries import configure_libraries

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
[OTHER_GROUPS] = [requirement.extras for requirement in EXTRAS["dev"] if requirement.name == PROJECT["name"]]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", folder, ROOT], check=True)
    return next(folder.glob("finetune_qlora-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", folder, wheel], check=True)
    return folder


def run_installed(site: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_console_command_works_from_any_folder(installed: Path, tmp_path: Path):
    where = run_installed(installed, tmp_path, sys.executable, "-c", "import finetune; print(finetune.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)
    overview = run_installed(installed, tmp_path, str(installed / "bin" / "finetune"), "--help")
    assert overview.returncode == 0 and "usage: finetune" in overview.stdout


def test_the_packaged_quickstart_plans_from_any_folder(installed: Path, tmp_path: Path):
    command = [str(installed / "bin" / "finetune"), "train", "config=quickstart.yaml", "--dry-run"]
    planned = run_installed(installed, tmp_path, *command)
    assert planned.returncode == 0, planned.stderr
    assert str(installed / "finetune" / "_packaged" / "data" / "tiny-qwen2.5") in planned.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_every_config_and_sample_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("finetune/") for name in names)
    assert not [name for name in names if "__pycache__" in name or "test" in name.split("/")[-1]]
    tracked = subprocess.run(["git", "ls-files", "configs", "data"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs the git checkout to know which files are ours")
    wanted = {f"finetune/_packaged/{name}" for name in tracked.stdout.splitlines()}
    assert wanted and wanted <= names
    code = subprocess.run(["git", "ls-files", "finetune"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(code.stdout.splitlines()) <= names  # also what is no Python, as the page of a server


def test_the_metadata_says_who_we_are(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "\nName: finetune-qlora\n" in text and f"\nVersion: {finetune.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text and "\nRequires-Python: >=3.11\n" in text


def imported_distributions() -> dict[str, set[str]]:
    """Distribution -> our files that import it, at any level of a file."""
    homes = importlib.metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for file in (ROOT / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for top in {module.split(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top != "finetune":
                    name = canonicalize_name(homes.get(top, [top])[0])
                    found.setdefault(name, set()).add(file.name)
    return found


def test_every_import_is_declared_and_every_dependency_is_imported():
    core = {canonicalize_name(requirement.name) for requirement in CORE}
    optional = {canonicalize_name(r.name) for name, rs in EXTRAS.items() if name != "dev" for r in rs}
    imported = imported_distributions()
    assert imported.pop("triton") == {"dequantize_nf4.py"}  # the CUDA builds of torch bring it
    assert not {name: files for name, files in imported.items() if name not in core | optional}
    assert not core - set(imported)


def test_every_pin_is_plain_and_every_requirement_has_one_inside_its_range():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line) for line in PINS)
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}
    assert len(pins) == len(PINS)
    wanted = [*CORE, *(r for requirements in EXTRAS.values() for r in requirements)]
    for requirement in (each for each in wanted if each.name != PROJECT["name"]):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_dev_extra_has_every_group():
    assert set(EXTRAS) - {"dev"} == OTHER_GROUPS


def test_every_install_command_names_groups_that_exist():
    files = [ROOT / "README.md", *(f for top in ("finetune", "docs", "notebooks") for f in (ROOT / top).rglob("*.*"))]
    texts = [file.read_text() for file in files if file.suffix in (".py", ".md", ".ipynb")]
    commands = [re.findall(r"(?:finetune-qlora|install -e ['\"\\]+\.)\[([a-z,]+)\]", text) for text in texts]
    named = {group for found in commands for groups in found for group in groups.split(",")}
    assert named >= OTHER_GROUPS and named <= set(EXTRAS)


def test_the_public_names_are_the_functions_they_say():
    assert {"load_config", "load_base", "load_tokenizer", "attach_lora", "train"} <= set(dir(finetune))
    for name in set(finetune.__all__) - {"__version__"}:
        assert getattr(finetune, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finetune.trian  # noqa: B018 - the access is the test


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_that_wait_give_their_core_up_unless_the_user_says_how_they_wait(own, found, repo_root):
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", "from finetune import load_config; import torch; torch.ones(3).sum()"]
    environment = {**unset, **own, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and found in done.stderr


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_gpu_memory_grows_in_place_unless_the_user_configures_the_allocator(own, found, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(own))
    configure_libraries()
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == found


def test_importing_the_package_changes_neither_the_environment_nor_any_logger():
    code = (
        "import os, logging; before = dict(os.environ)\n"
        "import finetune, finetune.models, finetune.cli\n"
        "assert dict(os.environ) == before and not logging.root.manager.loggerDict"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_launch_script_never_hides_the_function_of_its_name():
    with pytest.raises(ImportError, match="from finetune import train"):
        importlib.import_module("finetune.train")
    from finetune import train

    assert callable(train)
