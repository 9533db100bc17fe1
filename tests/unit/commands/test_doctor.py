"""The doctor reports on a machine in any state; a broken part is a finding, never the end of the report."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
import json
import os
import sys
import types

import pytest

from finetune.cli import main
from finetune.commands import doctor
from finetune.commands.doctor import CHECKS, Finding, diagnose
from finetune.system.arguments import Arguments

PLAIN = Arguments(None, (), frozenset())
JSON = Arguments(None, (), frozenset({"--json"}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check fine, without looking."""
    for name in list(CHECKS):
        monkeypatch.setitem(CHECKS, name, lambda: Finding("ok", "as it should be"))


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("note", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failed_check_fails_the_machine(quick, monkeypatch, capsys, status: str, exit_code: int):
    monkeypatch.setitem(CHECKS, "disk", lambda: Finding(status, "found this", "do that"))
    assert doctor.run(PLAIN) == exit_code
    out = capsys.readouterr().out
    assert "found this" in out and "do that" in out


def test_the_last_line_says_what_to_type_next(quick, monkeypatch, capsys):
    doctor.run(PLAIN)
    assert capsys.readouterr().out.splitlines()[-1].endswith("finetune init rows.jsonl")
    monkeypatch.setitem(CHECKS, "disk", lambda: Finding("fail", "found this", "do that"))
    doctor.run(PLAIN)
    assert capsys.readouterr().out.splitlines()[-1].endswith("next: do that")


def test_each_finding_is_printed_before_the_next_check_starts(quick, monkeypatch, capsys):
    monkeypatch.setitem(CHECKS, "python", lambda: Finding("ok", "found first"))
    printed = []
    monkeypatch.setitem(CHECKS, "packages", lambda: printed.append(capsys.readouterr().out) or Finding("ok", ""))
    doctor.run(PLAIN)
    assert "found first" in printed[0]


def test_another_distribution_of_the_name_is_a_warning(monkeypatch, tmp_path):
    assert doctor.check_import_name().status == "ok"
    (tmp_path / "finetune-0.10.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.check_import_name()
    assert finding.status == "warn" and "finetune-0.10.0" in finding.found and "pip uninstall" in finding.advice


def test_json_holds_every_check_and_nothing_else(quick, monkeypatch, capsys):
    def noisy() -> Finding:
        print("a library says hello")
        return Finding("fail", "broken", "mend it")

    monkeypatch.setitem(CHECKS, "4-bit", noisy)
    assert doctor.run(JSON) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    assert {"name": "4-bit", "status": "fail", "found": "broken", "advice": "mend it"} in report["checks"]


def test_torch_that_cannot_be_imported_is_a_finding(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] in ("torch", "bitsandbytes"):
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    findings = dict(diagnose())
    assert list(findings) == list(CHECKS)
    assert findings["device"].status == findings["4-bit"].status == "fail"
    assert "libcudart" in findings["device"].found


def test_a_missing_and_an_old_package_are_both_named(monkeypatch):
    monkeypatch.setattr(doctor, "_declared_requirements", lambda: ["packaging>=9999", "no-such-package>=1", "rich>=13"])
    finding = doctor.check_packages()
    assert finding.status == "fail"
    assert "no-such-package is missing" in finding.found and ">=9999" in finding.found
    assert "rich" not in finding.found


def test_the_declared_requirements_are_known_without_an_installation_and_without_extras(monkeypatch):
    assert any(line.startswith("torch>=") for line in doctor._declared_requirements())
    assert not any(line.startswith("pytest") for line in doctor._declared_requirements())

    def absent(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert any(line.startswith("torch>=") for line in doctor._declared_requirements())
    assert not any(line.startswith("pytest") for line in doctor._declared_requirements())


def test_four_bit_without_a_gradient_fails(monkeypatch):
    import torch

    class Deaf(torch.nn.Linear):
        def __init__(self, width, height, **_):
            super().__init__(width, height, bias=False)

        def forward(self, hidden):
            return hidden * 0

    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(nn=types.SimpleNamespace(Linear4bit=Deaf)))
    assert doctor.check_four_bit().status == "fail"


def test_four_bit_works_on_this_machine():
    assert doctor.check_four_bit().status == "ok"


def test_little_disk_fails_and_says_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    finding = doctor.check_disk()
    assert finding.status == "fail" and str(tmp_path) in finding.found


def test_little_shared_memory_names_the_container_setting(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=64 * 2**20))
    finding = doctor.check_shared_memory()
    assert finding.status == "warn" and "--shm-size" in finding.advice


def test_a_hub_that_never_answers_is_a_note(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "_answers", lambda _: doctor.threading.Event().wait(30))
    assert doctor.check_hub().status == "note"


def test_a_wandb_key_is_never_shown(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert doctor.check_wandb().status == "note"
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    finding = doctor.check_wandb()
    assert finding.status == "ok" and "very-secret" not in str(finding)


def test_a_wandb_login_file_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    login = tmp_path / "netrc"
    login.write_text("machine api.wandb.ai login user password very-secret\n")
    os.chmod(login, 0o600)
    monkeypatch.setenv("NETRC", str(login))
    finding = doctor.check_wandb()
    assert finding.status == "ok" and "very-secret" not in str(finding)


@pytest.mark.parametrize("word", ["config=lora.yaml", "lora.rank=3"])
def test_settings_are_refused(quick, capsys, word: str):
    assert main(["doctor", word]) == 2
    assert word in capsys.readouterr().err


def test_missing_libraries_of_media_are_named_by_their_extras(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) and name)
    assert doctor.check_media().status == "ok"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    finding = doctor.check_media()
    assert finding.status == "note" and finding.advice.endswith('"finetune-qlora[video]"')
