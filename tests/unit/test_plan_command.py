"""`finetune plan`: exit codes, JSON and tables; nothing heavy is imported, nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from finetune.cli import main
from finetune.planning import timing
from tests.unit.planning.test_timing import RATES


@pytest.fixture(autouse=True)
def without_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))


def plan(capsys, *words: str) -> tuple[int, dict]:
    code = main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_that_fits_ends_with_0_and_one_that_does_not_with_3(capsys):
    code, content = plan(capsys, "config=lora.yaml", "gpu_gb=16")
    assert code == 0 and content["fits"] and content["changes"] == []
    assert content["peak_bytes"] < content["needed_bytes"] <= content["free_bytes"] == 16e9
    assert sum(content["parts"].values()) == pytest.approx(content["peak_bytes"])
    code, content = plan(capsys, "config=lora.yaml", "gpu_gb=12", "train.recompute=none", "data.max_length=8192")
    assert code == 3 and not content["fits"]
    assert any(change["fits"] for change in content["changes"])


def test_what_auto_finds_fits_when_it_is_pasted(capsys):
    words = ("config=lora.yaml", "gpu_gb=10", "data.max_length=16384", "train.recompute=none")
    code, content = plan(capsys, *words, "auto=true")
    assert code == 3
    code, again = plan(capsys, *words, *content["auto"]["overrides"])
    assert code == 0 and again["needed_bytes"] == pytest.approx(content["auto"]["needed_bytes"])


def test_the_table_has_every_size_and_budget(capsys):
    code, lengths = plan(capsys, "table=true")
    assert code == 0 and list(lengths) == ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
    assert list(lengths["7B"]) == ["8", "12", "16", "24", "48", "80"]
    assert main(["plan", "table=true"]) == 0
    text = capsys.readouterr().out
    assert f"{lengths['7B']['24']:,}" in text and "\x1b" not in text and "base in nf4" in text


def test_the_text_says_what_is_held_where_it_does_not_fit_and_what_to_change(capsys):
    code = main(["plan", "config=lora.yaml", "gpu_gb=12", "train.recompute=none", "data.max_length=8192", "auto=true"])
    text = capsys.readouterr().out
    assert code == 3
    for words in ("activations kept", "linears in nf4", "predicted peak", "DOES NOT FIT", "saves", "fastest that fits",
                  "assumed", "TFLOP a step"):  # fmt: skip
        assert words in text


def test_time_is_measured_given_or_assumed_and_says_which(capsys):
    words = ("config=quickstart.yaml", "train.max_steps=10")
    assert "assumed" in plan(capsys, *words)[1]["rates"]
    timing.write_rates("cpu", RATES)
    content = plan(capsys, *words)[1]
    if content["device"] == "this machine's memory":
        assert content["rates"] == "measured on a machine"
    assert content["total_seconds"] == pytest.approx(10 * content["step_seconds"])
    given = plan(capsys, *words, "tflops=1")[1]
    assert given["rates"] == "given: 1 TFLOP/s" and sum(given["seconds_shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs config=X.yaml"),
        (("config=lora.yaml", "gpu_gb=0"), "gpu_gb"),
        (("config=lora.yaml", "gpu_bg=16"), "gpu_bg"),
        (("config=lora.yaml", "model.name=somebody/model"), "its shapes are not known here"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_torch_is_needed():
    code = (
        "import sys; from finetune.cli import main; main(['plan', 'config=lora.yaml', 'gpu_gb=8', 'auto=true']); "
        "main(['plan', 'table=true']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
