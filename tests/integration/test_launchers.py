"""Two ranks on a CPU train the same adapter under every launcher: one machine or two, and a job that is stopped."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.clusters import ROOT, finish, free_port, slurm_job, start
from tests.integration.test_launch_files import trainjob

SETTINGS = ["config=quickstart.yaml", "train.max_steps=2", "generation.num_examples=0", "data.eval=[]"]
TORCHRUN = ["bash", "launch/torchrun/train.sh"]
SLURM = ["bash", "launch/slurm/train.sbatch"]


def adapter(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["world_size"] == 2
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of two ranks that torchrun starts on one machine."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finish(start([*TORCHRUN, *SETTINGS, f"output_dir={folder}"], PET_NPROC_PER_NODE="2"))
    return adapter(folder)


def test_accelerate(tmp_path: Path, one_machine: str):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml"]
    # A port of its own, since tests run side by side.
    command += ["--main_process_port", str(free_port(range(20_000, 30_000)))]
    training = ["finetune/train.py", *SETTINGS, f"output_dir={tmp_path}/run"]
    finish(start([*command, *training], ACCELERATE_USE_CPU="true"))
    assert adapter(tmp_path / "run") == one_machine


def test_accelerate_on_two_machines(tmp_path: Path, one_machine: str):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "launch/accelerate/ddp-2x8gpu.yaml", "--num_processes", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port(range(20_000, 30_000)))]
    training = ["finetune/train.py", *SETTINGS, f"output_dir={tmp_path}/run"]
    machines = [
        start([*command, "--machine_rank", str(rank), *training], ACCELERATE_USE_CPU="true") for rank in range(2)
    ]
    finish(*machines)
    assert adapter(tmp_path / "run") == one_machine


def test_torchrun_on_two_machines(tmp_path: Path, one_machine: str):
    port = str(free_port(range(20_000, 30_000)))
    cluster = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    command = [*TORCHRUN, *SETTINGS, f"output_dir={tmp_path}/run"]
    finish(*[start(command, **cluster, PET_NODE_RANK=str(rank)) for rank in range(2)])
    assert adapter(tmp_path / "run") == one_machine


def test_slurm_on_two_nodes(tmp_path: Path, one_machine: str):
    finish(start([*SLURM, *SETTINGS, f"output_dir={tmp_path}/run"], **slurm_job(tmp_path, nodes=2)))
    assert adapter(tmp_path / "run") == one_machine


def test_skypilot_on_two_machines(tmp_path: Path, one_machine: str):
    task = yaml.safe_load((ROOT / "launch/skypilot/train.yaml").read_text())
    variables = {
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SETTINGS": " ".join(SETTINGS),
        "PET_MASTER_PORT": str(free_port(range(20_000, 30_000))),
    }
    script = task["run"].replace("output_dir=/outputs/run", f"output_dir={tmp_path}/run")
    finish(*[start(["bash", "-c", script], **variables, SKYPILOT_NODE_RANK=str(rank)) for rank in range(2)])
    assert adapter(tmp_path / "run") == one_machine


def test_the_trainjob_in_two_pods(tmp_path: Path, one_machine: str):
    container, trainer = trainjob()
    variables = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port(range(20_000, 30_000))),
    }
    arguments = [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in container["args"]]
    arguments = arguments[: arguments.index("train") + 1] + [*SETTINGS, f"output_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    finish(*[start(command, **variables, PET_NODE_RANK=str(rank)) for rank in range(2)])
    assert adapter(tmp_path / "run") == one_machine


def test_a_slurm_job_at_its_time_limit_saves_a_checkpoint_and_continues_in_the_queue(tmp_path: Path):
    run, job = tmp_path / "run", slurm_job(tmp_path, nodes=2)
    settings = [*SETTINGS[:1], "train.max_steps=80", "train.batch_size=2", *SETTINGS[2:], f"output_dir={run}"]
    batch = start([*SLURM, *settings], **job)
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):  # of its first step
        assert batch.poll() is None, batch.communicate()[0]
        time.sleep(0.05)
    batch.send_signal(signal.SIGUSR1)
    printed = batch.communicate()[0]
    assert batch.returncode != 0 and (tmp_path / "requeued").read_text() == f"{job['SLURM_JOB_ID']}\n", printed
    stopped = json.loads((run / "result.json").read_text())
    assert stopped["status"] == "stopped" and (run / f"checkpoint-{stopped['steps']}").is_dir()
    finish(start([*SLURM, *settings], **job))
    assert adapter(run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 81)] and len((tmp_path / "requeued").read_text().splitlines()) == 1
