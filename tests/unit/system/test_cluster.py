"""What joins GPUs and machines is read from nvidia-smi, psutil and the environment, and the doctor reports it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from types import SimpleNamespace

import psutil
import pytest
import torch

from finetune.commands import doctor
from finetune.system.cluster import gpu_links, interfaces, network_problems

TOPOLOGY = """\
	\x1b[4mGPU0	GPU1	GPU2	NIC0	CPU Affinity	NUMA Affinity	GPU NUMA ID\x1b[0m
GPU0	 X 	NV18	SYS	PIX	0-47	0		N/A
GPU1	NV18	 X 	SYS	PIX	0-47	0		N/A
GPU2	SYS	SYS	 X 	SYS	48-95	1		N/A
NIC0	PIX	PIX	SYS	 X

Legend:

  X    = Self
"""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The host names that have an address; the first is that of this machine."""
    known = {"here", "main"}

    def look_up(name: str, *_: object, **__: object) -> list[tuple[str]]:
        if name not in known:
            raise socket.gaierror(f"{name}: unknown")
        return [("address",)]

    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def test_pairs_of_gpus_are_counted_by_their_link():
    assert gpu_links(TOPOLOGY) == {"NV18": 1, "SYS": 2}
    assert gpu_links("No devices were found") == {}


def test_interfaces_that_are_up_have_addresses(monkeypatch: pytest.MonkeyPatch):
    def addresses(*texts: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(family=socket.AF_INET6 if ":" in t else socket.AF_INET, address=t) for t in texts]

    known = {"lo": addresses("127.0.0.1", "::1"), "eth0": addresses("10.0.0.5", "fe80::1%eth0")}
    known |= {"eth1": addresses("10.0.1.5"), "ib0": addresses("fe80::2%ib0")}
    states = {name: SimpleNamespace(isup=name != "eth1") for name in known}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    assert interfaces() == {"eth0": ["10.0.0.5"]}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, None),
        ({"MASTER_ADDR": "main", "NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, None),
        ({"PET_MASTER_ADDR": "gone"}, "PET_MASTER_ADDR=gone"),
        ({"MASTER_ADDR": "gone"}, "MASTER_ADDR=gone"),
        ({"PET_LOCAL_ADDR": "gone"}, "PET_LOCAL_ADDR=gone"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "NCCL_SOCKET_IFNAME=ib"),
        ({"NCCL_SOCKET_IFNAME": "^eth,lo"}, "NCCL_SOCKET_IFNAME=^eth,lo"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth"),
    ],
)
def test_what_would_stop_a_run_on_several_machines_is_named(
    names: set[str], environment: dict[str, str], named: str | None
):
    problems = list(network_problems(environment, {"eth0": ["10.0.0.5"]}))
    assert len(problems) == (named is not None) and all(text.startswith(f"{named} ") for text in problems)


def test_a_machine_whose_name_has_no_address_is_warned(names: set[str], monkeypatch: pytest.MonkeyPatch):
    names.remove("here")
    monkeypatch.setattr(doctor, "interfaces", lambda: {"eth0": ["10.0.0.5"]})
    finding = doctor.check_network()
    assert finding.status == "warn" and "eth0 10.0.0.5" in finding.found and "here" in finding.found
    monkeypatch.setenv("PET_LOCAL_ADDR", "main")
    assert doctor.check_network().status == "ok"


def test_a_sandbox_that_hides_its_network_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    def hidden():
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(doctor, "interfaces", hidden)
    assert doctor.check_network().status == "note"


def test_the_doctor_shows_the_links_of_several_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "found_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=TOPOLOGY))
    finding = doctor.check_gpu_links()
    assert finding.status == "note" and finding.advice
    assert all(part in finding.found for part in ("3 GPUs", "NCCL 2.28.3", "NV18 1", "SYS 2"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=TOPOLOGY.replace("SYS", "NV18")))
    assert doctor.check_gpu_links().status == "ok"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert doctor.check_gpu_links().status == "note"
