"""usage: finetune doctor [--json]

Checks Python, the packages, GPUs and their links, 4-bit training, disk, network, the model hub and tracking, with
advice for each finding.
Exit code 0: training can run here; 1: it cannot.
  --json   print {"ok": …, "checks": [{"name", "status", "found", "advice"}]}

Example
  finetune doctor
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from finetune.commands.base import Command
from finetune.system.accelerator import default_device, found_accelerator, kind_of, runtime
from finetune.system.arguments import Arguments
from finetune.system.cluster import SLOW_LINKS, gpu_links, interfaces, network_problems
from finetune.system.console import colored
from finetune.system.format import format_bytes
from finetune.system.other_finetune import ADVICE, other_distribution
from finetune.system.wandb_login import has_wandb_key

GB = 10**9
HUB_TIMEOUT_SECONDS = 3.0
# By extra, the modules that it installs.
_MEDIA = {"vision": ("PIL",), "audio": ("soundfile",), "video": ("av", "PIL")}
_COLORS: dict[str, Literal["red", "green", "yellow"]] = {
    "ok": "green",
    "note": "green",
    "warn": "yellow",
    "fail": "red",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One result; status is ok, note (nothing to fix), warn (works with a limit) or fail (training cannot run)."""

    status: str
    found: str
    advice: str = ""


def run(arguments: Arguments) -> int:
    """Print every finding as soon as it is made, then what to type next; return 1 if training cannot run here."""
    as_json = "--json" in arguments.flags
    findings = {}
    for name, finding in diagnose():
        findings[name] = finding
        if not as_json:
            advice = f"\n{'':21}-> {finding.advice}" if finding.advice else ""
            status = colored(f"{finding.status:<5}", _COLORS[finding.status], sys.stdout)
            print(f"{status} {name:<14} {finding.found}{advice}", flush=True)
    ok = all(finding.status != "fail" for finding in findings.values())
    if as_json:
        checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
        print(json.dumps({"ok": ok, "checks": checks}, indent=2))
    else:
        print(f"\n{_next(findings)}")
    return 0 if ok else 1


def _next(findings: Mapping[str, Finding]) -> str:
    """Return what to type next: the remedy of the first failed check, else the first command with data."""
    for name, finding in findings.items():
        if finding.status == "fail":
            return f"training cannot run here ({name}); next: {finding.advice}"
    return "training can run here; next: finetune init rows.jsonl"


def diagnose() -> Iterator[tuple[str, Finding]]:
    """Yield the name and finding of every check; a check that raises has failed, and the next ones run."""
    # bitsandbytes warns about optional parts; check_four_bit tries the parts that matter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, check in CHECKS.items():
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not mix with the report
            try:
                finding = check()
            except Exception as error:  # noqa: BLE001 - a broken installation can raise anything, and that is the finding
                finding = Finding("fail", f"{type(error).__name__}: {error}", "reinstall the named package")
        yield name, finding


def check_packages() -> Finding:
    """Compare the installed versions with the ranges of the project."""
    from packaging.requirements import Requirement

    versions, wrong = {}, []
    for requirement in map(Requirement, _declared_requirements()):
        try:
            versions[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            wrong.append(f"{requirement.name} {versions[requirement.name]} is not {requirement.specifier}")
    if wrong:
        return Finding("fail", "; ".join(wrong), "bash launch/setup.sh, or: pip install --upgrade finetune-qlora")
    named = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "hydra-core")
    return Finding("ok", ", ".join(f"{name} {versions[name]}" for name in named))


def check_import_name() -> Finding:
    """Check that no other distribution is imported as `finetune`."""
    found = other_distribution()
    return Finding("ok", "finetune is finetune-qlora") if found is None else Finding("warn", found, ADVICE)


def check_device() -> Finding:
    """Report the devices of torch."""
    import torch

    from finetune.ops.matmul import uses_fp32_matmul

    if (device := found_accelerator()) is not None:
        kind, gpus = kind_of(device.type), runtime(device)
        if kind.refused:
            return Finding("warn", f"{kind.name} is not used: {kind.refused}", "training uses the CPU")
        devices = [gpus.get_device_properties(index) for index in range(gpus.device_count())]
        sizes = ", ".join(f"{each.name} {format_bytes(each.total_memory)}" for each in devices)
        found = f"{kind.name}, torch {torch.__version__}: {sizes}"
        if not gpus.is_bf16_supported(including_emulation=False):
            return Finding("warn", f"{found}, no bfloat16", "set model.dtype=float16 and quant.compute_dtype=float16")
        if kind.untested:
            return Finding("warn", f"{found}, bfloat16", "no test of finetune ran on such a device: try the quickstart")
        return Finding("ok", f"{found}, bfloat16")
    found = f"CPU only, {torch.get_num_threads()} threads"
    if uses_fp32_matmul(torch.device("cpu"), torch.bfloat16):
        found += ", no bfloat16 products (training uses float32)"
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        advice = f"an NVIDIA driver is installed, but torch {torch.__version__} sees no GPU: install torch's CUDA build"
        return Finding("warn", found, f"{advice}, or check CUDA_VISIBLE_DEVICES and the driver's version")
    return Finding("warn", found, "fine for tiny models and the quickstart; larger ones need a GPU")


def check_four_bit() -> Finding:
    """Run a 4-bit layer forward and backward on the device of training."""
    import bitsandbytes
    import torch

    device = default_device()
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(device)
    hidden_TD = torch.randn(4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(hidden_TD).float().sum().backward()
    if hidden_TD.grad is None or not hidden_TD.grad.isfinite().all() or not hidden_TD.grad.any():
        return Finding("fail", f"NF4 on {device} gives no usable gradient", "reinstall bitsandbytes for this torch")
    return Finding("ok", f"bitsandbytes {bitsandbytes.__version__}: NF4 forward and backward on {device}")


def _space(folder: Path, where: str, least_bytes: int, status: str, advice: str) -> Finding:
    """Report the free space of a folder, with this status and advice below `least_bytes`."""
    free_bytes = shutil.disk_usage(folder).free
    found = f"{format_bytes(free_bytes)} free {where}"
    if not os.access(folder, os.W_OK):
        return Finding("warn", f"{found}, not writable", advice)
    return Finding("ok", found) if free_bytes >= least_bytes else Finding(status, found, advice)


def check_disk() -> Finding:
    """Check the space of the current folder."""
    return _space(Path.cwd(), f"in {Path.cwd()}", GB, "fail", "run from a folder with 1 GB free, or set output_dir")


def check_hub_cache() -> Finding:
    """Check the space of the cache of downloaded models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    existing = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if folder.exists())
    advice = "a 7B model has 15 GB; set HF_HOME to a folder of yours on a larger disk for models of that size"
    return _space(existing, f"for {HF_HUB_CACHE}", 20 * GB, "warn", advice)


def check_hub() -> Finding:
    """Check whether models can be downloaded; local folders need no hub."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Finding("note", "offline by HF_HUB_OFFLINE: cached models and local folders only")
    answers: list[bool] = []
    # A thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=lambda: answers.append(_answers(ENDPOINT)), daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS + 0.5)
    if any(answers):
        return Finding("ok", f"{ENDPOINT} answers")
    return Finding("note", f"{ENDPOINT} does not answer: cached models and local folders only")


def check_wandb() -> Finding:
    """Check whether Weights & Biases uploads, without showing the key."""
    if importlib.util.find_spec("wandb") is None:
        return Finding("note", "not installed", 'for track.wandb=true: pip install "finetune-qlora[tracking]"')
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("note", f"WANDB_MODE={mode}")
    if has_wandb_key():
        return Finding("ok", "logged in")
    return Finding("note", "not logged in: track.wandb=true records offline", "to upload: wandb login")


def check_media() -> Finding:
    """Report which kinds of files in rows can be read: each kind is an extra."""
    absent = [
        kind for kind, modules in _MEDIA.items() if any(importlib.util.find_spec(name) is None for name in modules)
    ]
    found = ", ".join(f"{kind} {'is missing' if kind in absent else 'can be read'}" for kind in _MEDIA)
    if not absent:
        return Finding("ok", found)
    return Finding("note", found, f'for rows with such files: pip install "finetune-qlora[{",".join(absent)}]"')


def check_shared_memory() -> Finding:
    """Check /dev/shm, through which processes and data workers exchange data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("note", "this system has no /dev/shm")
    advice = "several ranks may hang or crash; in a container start it with --shm-size=2g"
    return _space(folder, "in /dev/shm", GB // 4, "warn", advice)


def check_gpu_links() -> Finding:
    """Report how the GPUs of this machine exchange data."""
    import torch

    if (device := found_accelerator()) is None or (count := runtime(device).device_count()) < 2:
        return Finding("note", "fewer than two GPUs: nothing to link")
    found = f"{count} GPUs"
    if torch.distributed.is_nccl_available():
        found += f", NCCL {'.'.join(map(str, runtime(device).nccl.version()))}"
    if shutil.which("nvidia-smi") is None:
        return Finding("note", f"{found}, links unknown without nvidia-smi")
    shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30)
    links = gpu_links(shown.stdout)
    found += f", pairs by link: {', '.join(f'{name} {pairs}' for name, pairs in sorted(links.items())) or 'unknown'}"
    if SLOW_LINKS & links.keys():
        advice = "PHB, NODE and SYS cross the processors: with parallel.shard=full prefer large micro-batches"
        return Finding("note", found, advice)
    return Finding("ok", found)


def check_network() -> Finding:
    """Report the network interfaces, and what would stop a run on several machines."""
    try:
        found = interfaces()
    except OSError as error:  # of a sandbox without these system calls
        return Finding("note", f"interfaces unknown: {error.strerror}")
    text = ", ".join(f"{name} {addresses[0]}" for name, addresses in found.items()) or "no interface"
    problems = list(network_problems(os.environ, found))
    if problems:
        return Finding("warn", f"{text}; for several machines: {'; '.join(problems)}", "see docs/parallel.md")
    return Finding("ok" if found else "note", text)


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": lambda: Finding("ok", f"{platform.python_version()} on {platform.platform()} ({sys.executable})"),
    "packages": check_packages,
    "import name": check_import_name,
    "device": check_device,
    "4-bit": check_four_bit,
    "disk": check_disk,
    "model cache": check_hub_cache,
    "model hub": check_hub,
    "media": check_media,
    "wandb": check_wandb,
    "shared memory": check_shared_memory,
    "GPU links": check_gpu_links,
    "network": check_network,
}


def _declared_requirements() -> list[str]:
    """Return the dependencies from the metadata, or from pyproject.toml of a checkout that is not installed."""
    try:
        lines = importlib.metadata.requires("finetune-qlora") or []
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return [line for line in lines if "extra ==" not in line]


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.head(url, timeout=HUB_TIMEOUT_SECONDS, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False


COMMAND = Command("doctor", __doc__, run, flags=("--json",))
