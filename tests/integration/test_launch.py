"""The launchers start what they say: one environment, made once; the ranks asked for; runs that stop with them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE_CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
PROGRAMS = {"accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}


def opening_command(file: Path) -> str:
    """The launch command in a config's opening comment."""
    return next(line.removeprefix("#").strip() for line in file.read_text().splitlines() if "accelerate launch" in line)


def run_script(name: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(ROOT / "launch" / name), *arguments]
    return subprocess.run(script, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def wait_for(file: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.05)
    return file.read_text()


def test_setup_takes_the_python_it_is_given_and_installs_nothing_twice(tmp_path: Path):
    first = run_script("setup.sh", "dev", cwd=tmp_path, FINETUNE_PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    second = run_script("setup.sh", "dev", cwd=tmp_path, FINETUNE_PYTHON=sys.executable)
    assert second.stdout == f"{sys.executable}\n" and second.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_setup_refuses_an_old_python_and_a_missing_one(tmp_path: Path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    refused = run_script("setup.sh", FINETUNE_PYTHON=str(old))
    assert refused.returncode == 2 and "Python 3.9.1; Python 3.11 or newer is needed" in refused.stderr
    missing = run_script("setup.sh", FINETUNE_PYTHON=str(tmp_path / "none"))
    assert missing.returncode == 2 and "not an executable" in missing.stderr


@pytest.mark.parametrize("uv", [False, True])
@pytest.mark.parametrize(("script", "group"), [("quickstart.sh", ""), ("test.sh", "[dev]")])
def test_each_script_installs_its_packages_with_uv_or_pip_and_torch_with_pip(
    tmp_path: Path, script: str, group: str, uv: bool
):
    """The stand-in Python has no packages, and notes what it is asked to run."""
    noted, python = tmp_path / "noted", tmp_path / "python"
    note = f'echo "$(basename "$0") $@" >> {noted}\n'
    python.write_text(f'#!/bin/sh\nif [ "$1" != -m ]; then exec {sys.executable} -S "$@"; fi\n{note}')
    commands = [python]
    if uv:
        commands.append(tmp_path / "uv")
        commands[-1].write_text(f"#!/bin/sh\n{note}")
    for command in commands:
        command.chmod(0o755)
    system = "/usr/local/bin:/usr/bin:/bin"
    done = run_script(script, cwd=tmp_path, FINETUNE_PYTHON=str(python), PATH=f"{tmp_path}:{system}")
    assert done.returncode == 0, done.stderr
    *installs, last = [line for line in noted.read_text().splitlines() if "--version" not in line]
    ours = f"--editable {ROOT}{group} --constraint {ROOT}/constraints.txt"
    assert installs[-1].startswith("uv " if uv else "python -m pip ") and installs[-1].endswith(ours)
    assert [line.split()[:3] for line in installs[:-1]] == [["python", "-m", "pip"]] * uv
    assert all(" torch " in line for line in installs[:-1]) and " pip " not in last


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_no_script_goes_on_without_its_environment(script: str, tmp_path: Path):
    stopped = run_script(script, cwd=tmp_path, FINETUNE_PYTHON=str(tmp_path / "none"))
    assert stopped.returncode == 2 and stopped.stdout == ""


def test_test_script_hands_its_arguments_to_pytest():
    collected = run_script("test.sh", "--collect-only", "-q", __file__, FINETUNE_PYTHON=sys.executable)
    assert collected.returncode == 0 and "test_test_script_hands_its_arguments_to_pytest" in collected.stdout


@pytest.mark.parametrize("file", ACCELERATE_CONFIGS, ids=lambda file: file.name)
def test_accelerate_understands_every_config_and_its_opening_command(file: Path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    ranks = yaml.safe_load(file.read_text()).get("num_processes", -1)
    assert load_config_from_file(str(file)).num_processes == ranks
    _, command = opening_command(file).replace('"$(nvidia-smi --list-gpus | wc -l)"', "4").split("accelerate launch ")
    parsed = launch_command_parser().parse_args(shlex.split(command))
    assert Path(parsed.config_file) == file.relative_to(ROOT)
    assert parsed.training_script == "finetune/train.py" and parsed.training_script_args[0].startswith("config=")
    asked = [word for word in parsed.training_script_args if word.startswith("train.world_size=")]
    assert asked in ([], [f"train.world_size={ranks}"])


def test_the_command_for_two_cpu_ranks_really_starts_two(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch, accelerate\n"
        "accelerator = accelerate.Accelerator()\n"
        "numbers = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()\n"
        "found = [accelerator.num_processes, numbers, str(accelerator.device.type), torch.distributed.get_backend()]\n"
        "if accelerator.is_main_process:\n"
        "    open(sys.argv[1], 'w').write(repr(found))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = opening_command(ROOT / "launch" / "accelerate" / "cpu2.yaml")
    command = re.sub(r"finetune/train\.py .*", f"{script} {tmp_path / 'found'}", command)
    command = command.replace("accelerate launch", f"{shlex.join(PROGRAMS['accelerate'])} launch")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text() == "[2, [0, 1], 'cpu', 'gloo']"


def test_the_script_imports_the_checkout_and_shadows_nothing(tmp_path: Path):
    """Run as a launcher runs it, with the package's folder first on sys.path."""
    script = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'finetune')!r}]\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'finetune' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    import finetune, importlib.util\n"
        "    print(end.code, finetune.__file__, sys.path[0], importlib.util.find_spec('cli'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"0 {ROOT / 'finetune' / '__init__.py'} {ROOT} None"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
@pytest.mark.parametrize("launched", [True, False])
def test_a_run_gets_sigterm_when_its_launcher_is_killed_and_only_then(tmp_path: Path, launched: bool):
    run = tmp_path / "run.py"
    run.write_text(
        "import os, pathlib, runpy, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"script = runpy.run_path({str(ROOT / 'finetune' / 'train.py')!r}, run_name='script')\n"
        "def stop(number, frame):\n"
        "    (folder / 'stopped').write_text(str(number))\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "script['stop_with_launcher']()\n"
        "(folder / 'started').write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, {str(run)!r}, {str(tmp_path)!r}])"
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")}
    if launched:
        environment["ACCELERATE_MIXED_PRECISION"] = "no"
    parent = subprocess.Popen([sys.executable, "-c", launcher], env=environment)
    pid = int(wait_for(tmp_path / "started"))
    parent.kill()
    parent.wait()
    if launched:
        assert wait_for(tmp_path / "stopped") == str(int(signal.SIGTERM))
    else:
        time.sleep(0.5)
        assert not (tmp_path / "stopped").exists()
        os.kill(pid, signal.SIGTERM)
        assert wait_for(tmp_path / "stopped")


def test_quickstart_trains_from_any_folder(tmp_path: Path):
    settings = ["train.max_steps=2", "train.batch_size=2", "generation.num_examples=4", "generation.max_new_tokens=8"]
    done = run_script("quickstart.sh", *settings, cwd=tmp_path, FINETUNE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "quickstart"
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 2
    assert result["exact_match_before"] is not None and result["exact_match_after"] is not None
    assert (folder / "adapter_model.safetensors").is_file()
    assert "default_config" not in done.stderr and "were not passed to" not in done.stderr


def test_quickstart_writes_where_it_is_told(tmp_path: Path):
    planned = run_script("quickstart.sh", "--dry-run", "output_dir=here", cwd=tmp_path, FINETUNE_PYTHON=sys.executable)
    assert planned.returncode == 0, planned.stderr
    assert "\noutput_dir: here\n" in planned.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_killing_the_launcher_of_a_training_saves_a_checkpoint(tmp_path: Path):
    settings = ["train.max_steps=5000", "train.batch_size=2", "generation.num_examples=0", "data.eval=[]"]
    script = ["bash", str(ROOT / "launch" / "quickstart.sh"), *settings, f"output_dir={tmp_path}"]
    launcher = subprocess.Popen(
        script, env={**os.environ, "FINETUNE_PYTHON": sys.executable}, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path / "metrics.jsonl", seconds=300)
    launcher.terminate()
    launcher.wait()
    result = json.loads(wait_for(tmp_path / "result.json"))
    assert result["status"] == "stopped" and result["steps"] >= 1
    assert (tmp_path / f"checkpoint-{result['steps']}" / "adapter_model.safetensors").is_file()


def test_a_wrong_setting_stops_quickstart_with_its_message_alone(tmp_path: Path):
    done = run_script("quickstart.sh", "train.max_step=3", cwd=tmp_path, FINETUNE_PYTHON=sys.executable)
    assert done.returncode != 0
    assert "train.max_steps" in done.stderr and "Traceback" not in done.stderr
