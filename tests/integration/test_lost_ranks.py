"""A rank of a real run is killed, stopped or cut off: the others end and name it; a restart ends in the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.lost_ranks import CASES, SETTINGS, Case, launch, measure, names, wait_until
from tests.network import why_no_hosts
from tests.runs import differing

TIMING = "beat=0.5,lost=8,broken=4,grace=4"
SHORT = (*SETTINGS, "train.max_steps=24")
on_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run of two ranks on one host."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launch("torchrun", SHORT, folder) as launched:
        assert launched.wait() == [0], launched.output.read_text()
    return folder / "run"


def case_of(launcher: str, victim: int, fault: str):
    marks = [on_hosts] if launcher == "hosts" else []
    return pytest.param(Case(launcher, victim, fault), id=f"{launcher}-{victim}-{fault}", marks=marks)


@pytest.mark.parametrize("case", [case_of(case.launcher, case.victim, case.fault) for case in CASES])
def test_the_others_end_with_the_rank_and_its_host_named(tmp_path, case: Case):
    seconds, output = measure(case, tmp_path, TIMING)
    assert seconds < 60 and names(output, case), output


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_restart_after_a_kill_ends_in_the_bits_of_an_undisturbed_run(tmp_path, undisturbed, shard):
    settings = (*SHORT, f"parallel.shard={shard}")
    if shard != "none":
        with launch("torchrun", settings, tmp_path / "whole") as launched:
            assert launched.wait() == [0], launched.output.read_text()
        undisturbed = tmp_path / "whole" / "run"
    with launch("torchrun", settings, tmp_path, timing=TIMING, restarts=3) as launched:
        wait_until(lambda: (tmp_path / "run" / "checkpoint-8").exists(), launched)
        launched.ranks()[1].send_signal(signal.SIGKILL)
        assert launched.wait() == [0], launched.output.read_text()
        assert "continuing from" in launched.output.read_text()
    assert differing(undisturbed, tmp_path / "run") == []


@on_hosts
@pytest.mark.parametrize("rate_mbit", [0, 20], ids=["fast", "slow"])
def test_two_hosts_train_the_adapter_of_one(tmp_path, undisturbed, rate_mbit):
    with launch("hosts", SHORT, tmp_path, rate_mbit=rate_mbit) as launched:
        assert launched.wait() == [0, 0], launched.output.read_text()
    assert differing(undisturbed, tmp_path / "run") == []


@on_hosts
def test_a_run_goes_on_when_a_link_comes_back(tmp_path, undisturbed):
    with launch("hosts", SHORT, tmp_path) as launched:
        wait_until(lambda: (tmp_path / "run" / "checkpoint-4").exists(), launched)
        assert launched.hosts is not None
        launched.hosts[1].set_link("down")
        with pytest.raises(RuntimeError):  # Nothing ends meanwhile, and no step is made.
            wait_until(lambda: (tmp_path / "run" / "checkpoint-24").exists(), launched, seconds=10)
        launched.hosts[1].set_link("up")
        assert launched.wait() == [0, 0], launched.output.read_text()
    assert differing(undisturbed, tmp_path / "run") == []
