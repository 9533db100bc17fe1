"""The benchmarks from end to end on a model of two layers: what they measure there means nothing, that they do does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import measure

SMALL = ("size=tiny", "limit=40", "steps=2", "warmup=1", "ceiling_seconds=0.01")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the random model and its quantized copy, shared by the tests of this file."""
    return tmp_path_factory.mktemp("work")


def benchmark(repo_root: Path, name: str, *words: str) -> tuple[dict[str, Any], str]:
    """The JSON of the last line, and what was said beside it."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_throughput_tells_the_ratios_of_its_own_figures(repo_root: Path, work: Path, tmp_path: Path):
    words = (
        *SMALL,
        f"work={work}",
        f"results={tmp_path}",
        "repeats=1",
        "length=64",
        "batch=2",
        "ours=uncompiled,plain",
    )
    told, text = benchmark(repo_root, "throughput", *words, "stock=padded,packing")
    ours, stock = told["ours"], told["stock"]
    assert set(stock) == {"padded", "packing"} and set(told["variants"]) == {"uncompiled", "plain"}
    assert all("failed" not in figures for figures in (*stock.values(), *told["variants"].values())), text
    assert told["ratio"] == ours["tokens_per_second"] / max(s["tokens_per_second"] for s in stock.values())
    assert told["peak_ratio"] == ours["peak_bytes"] / min(s["peak_bytes"] for s in stock.values())
    assert told["ceiling_share"] == ours["flops_per_second"] / told["ceiling"]["flops_per_second"]
    assert 0 < ours["target_tokens_per_second"] < ours["tokens_per_second"]
    assert {"liger", "unsloth", "llama-factory"} == set(told["peers"]) and "of ceiling" in text
    (file,) = tmp_path.glob("throughput-*.json")
    written = json.loads(file.read_text())
    assert written["ratio"] == told["ratio"] and len(written["runs"]["ours uncompiled"][0]["steps"]) == 3


def test_distilling_is_priced_on_the_rows_of_plain_fine_tuning(repo_root: Path, work: Path, tmp_path: Path):
    words = (
        *SMALL[:-1],
        f"work={work}",
        f"results={tmp_path}",
        "repeats=1",
        "length=128",
        "batch=2",
        "ours=uncompiled",
    )
    told, text = benchmark(repo_root, "distill", *words, "variants=cached,resident", "stock=gkd")
    ours, gkd = told["variants"], told["stock"]["gkd"]
    assert set(ours) == {"plain", "cached", "resident"}
    assert all("failed" not in figures for figures in (*ours.values(), gkd)), text
    assert ours["cached"]["price"] == ours["cached"]["step_seconds"] / ours["plain"]["step_seconds"]
    assert ours["cached"]["peak_price"] == ours["cached"]["peak_bytes"] / ours["plain"]["peak_bytes"]
    assert told["ratio"] == ours["resident"]["tokens_per_second"] / gkd["tokens_per_second"]
    assert told["peak_ratio"] == ours["resident"]["peak_bytes"] / gkd["peak_bytes"]
    assert {(bar["variant"], bar["figure"]) for bar in told["bars"]} == {
        ("cached", "price"),
        ("cached", "peak_price"),
        ("resident", "ratio"),
        ("resident", "peak_ratio"),
    }
    assert told["signals"]["sampled"]["documents"] == 40 and told["signals"]["sampled"]["bytes_per_target"] <= 180
    (file,) = tmp_path.glob("distill-*.json")
    steps = {name: runs[0]["steps"] for name, runs in json.loads(file.read_text())["runs"].items()}
    counted = [[(step["tokens"], step["target_tokens"]) for step in steps[f"ours {name}"]] for name in ours]
    assert counted[0] == counted[1] == counted[2] and len(counted[0]) == 3
    # A random model's loss on rows is a thousand times what four bits took from it.
    losses = {name: steps[f"ours {name}"][0]["loss"] for name in ours}
    assert max(losses["cached"], losses["resident"]) < losses["plain"] / 10


def test_learning_from_pairs_is_priced_on_their_answers_as_rows(repo_root: Path, work: Path, tmp_path: Path):
    words = ("size=tiny", "steps=2", "warmup=1", f"work={work}", f"results={tmp_path}", "repeats=1", "ours=uncompiled")
    told, text = benchmark(repo_root, "preference", *words, "pairs=3", "prompt=24", "answer=16", "stock=dpo")
    ours, dpo = told["variants"], told["stock"]["dpo"]
    assert set(ours) == {"sft", "base", "cached"} and told["reference"]["documents"] == 6
    assert all("failed" not in figures for figures in (*ours.values(), dpo)), text
    assert ours["base"]["price"] == ours["base"]["step_seconds"] / ours["sft"]["step_seconds"]
    assert ours["base"]["ratio"] == pytest.approx(ours["base"]["pairs_per_second"] / dpo["pairs_per_second"])
    assert ours["base"]["peak_ratio"] == ours["base"]["peak_bytes"] / dpo["peak_bytes"]
    assert {(bar["variant"], bar["figure"]) for bar in told["bars"]} == {
        ("base", "ratio"),
        ("base", "peak_ratio"),
        ("base", "price"),
        ("cached", "price"),
    }
    (file,) = tmp_path.glob("preference-*.json")
    steps = {name: runs[0]["steps"] for name, runs in json.loads(file.read_text())["runs"].items()}
    keys = ("tokens", "computed_tokens", "target_tokens")
    counted = [[tuple(step[key] for key in keys) for step in steps[f"ours {name}"]] for name in ours]
    assert counted[0] == counted[1] == counted[2] and len(counted[0]) == 3
    # TRL trains the newline after each answer as well.
    assert {step["target_tokens"] for step in steps["stock dpo"]} == {counted[0][0][2] + 6}
    assert counted[0][0][1] < counted[0][0][0] == steps["stock dpo"][0]["tokens"]
    base, cached = ([step["loss"] for step in steps[f"ours {name}"]] for name in ("base", "cached"))
    assert base == pytest.approx(cached, rel=1e-4)


def test_learning_from_rewards_is_timed_by_sampling_and_update(repo_root: Path, work: Path, tmp_path: Path):
    words = ("size=tiny", "steps=2", "warmup=1", f"work={work}", f"results={tmp_path}", "repeats=1", "ours=uncompiled")
    shape = ("prompts=2", "group=4", "prompt=24", "answer=8")
    told, text = benchmark(repo_root, "grpo", *words, *shape, "stock=grpo")
    ours, grpo = told["ours"], told["stock"]["grpo"]
    assert "failed" not in ours and "failed" not in grpo, text
    assert ours["step_ratio"] == grpo["step_seconds"] / ours["step_seconds"]
    assert ours["update_ratio"] == grpo["update_seconds"] / ours["update_seconds"]
    assert {bar["figure"] for bar in told["bars"]} == {"step_ratio", "update_ratio"}
    # An answer of a random model may end before its limit.
    assert all(32 <= side["answer_tokens"] <= 64 for side in (ours, grpo))
    assert ours["computed_tokens"] < ours["tokens"] and grpo["computed_tokens"] == grpo["tokens"]
    (file,) = tmp_path.glob("grpo-*.json")
    for runs in json.loads(file.read_text())["runs"].values():
        assert all(0 < step["sampling_seconds"] < step["seconds"] for step in runs[0]["steps"])


def test_writing_answers_is_timed_side_by_side(repo_root: Path, work: Path, tmp_path: Path):
    words = ("size=tiny", "batches=1,3", "prompt=9", "tokens=16", "repeats=1", f"work={work}", f"results={tmp_path}")
    told, text = benchmark(repo_root, "decoding", *words)
    assert {f"{side} {n}" for side in ("ours", "resident", "transformers") for n in (1, 3)} <= told["sides"].keys()
    assert "transformers 3" in text
    for name, figures in told["sides"].items():
        assert figures["tokens_per_second"] == int(name.split()[-1]) / figures["token_seconds"]
        assert all(figure > 0 for figure in figures.values())
    (file,) = tmp_path.glob("decoding-*.json")
    assert json.loads(file.read_text())["sides"] == told["sides"]


def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(repo_root: Path, work: Path, tmp_path: Path):
    words = (*SMALL, f"work={work}", f"results={tmp_path}", "lengths=64", "stock=none")
    words += ("parts=throughput,context", "ours=broken,uncompiled", "ours.broken=train.nonsense=1", "adapters=v_proj:2")
    told, _ = benchmark(repo_root, "gpu", *words, "budgets=4", "context_seconds=30", "context_most=256")
    assert "nonsense" in told["ours"]["failed"] and told["ratio"] is None
    assert told["table"]["ours uncompiled v_proj:2 64"]["tokens_per_second"] > 0
    assert told["contexts"]["4"]["tokens"] == 256 and not told["contexts"]["4"]["extrapolated"]
    (file,) = tmp_path.glob("gpu-*.json")
    assert json.loads(file.read_text())["table"] == told["table"]


def test_a_gpu_benchmark_without_time_says_so_and_ends(repo_root: Path, work: Path, tmp_path: Path):
    words = ("size=tiny", f"work={work}", f"results={tmp_path}", "lengths=64", "minutes=0.001")
    told, _ = benchmark(repo_root, "gpu", *words)
    assert {figures["failed"] for figures in told["table"].values()} == {"no time left"}
    assert {told["distill"]["ours"]["failed"], told["load"]["loads"]["first"]["failed"]} == {"no time left"}


def test_a_process_that_hangs_is_ended_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)")
    (tmp_path / "failing.py").write_text("raise SystemExit('the reason')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    assert measure("hanging", {}, limit_seconds=0.5) == {"failed": "not done after 0 s"}
    assert time.monotonic() - start < 30
    assert measure("failing", {}, limit_seconds=30)["failed"] == "the reason"
