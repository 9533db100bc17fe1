"""What the benchmarks divide by: operations counted by torch itself, lines through points, ratios of figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.context import search
from benchmarks.distill import judged, needed_price, prices
from benchmarks.figures import ceiling_of, compare, medians, run_figures
from benchmarks.flops import attention_flops, step_flops, teacher_flops
from benchmarks.memory import fit
from benchmarks.rows import write_pairs
from benchmarks.workload import Workload
from tests.models import random_qwen2

TOKENS, TARGETS = 24, 5
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def counted() -> tuple[dict, dict]:
    """(config, operations by kind) of one document's forward and backward over a frozen model, head on targets only."""
    model = random_qwen2("eager").requires_grad_(False)
    embeddings = torch.randn(1, TOKENS, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -TARGETS:]
        model.lm_head(hidden).sum().backward()
    counts = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    return model.config.to_dict(), counts


def test_4n_is_what_a_frozen_models_linears_take(counted):
    config, counts = counted
    assert step_flops(config, TOKENS, TARGETS) == counts["aten.mm"] + counts.get("aten.addmm", 0)


def test_attention_is_half_of_what_the_dense_products_take(counted):
    config, counts = counted
    assert attention_flops(config, TOKENS, TOKENS) == counts["aten.bmm"] / 2


def test_tokens_computed_once_count_once_but_every_target_counts(counted):
    config, _ = counted
    shared = step_flops(config, TOKENS, TARGETS, computed_tokens=TOKENS / 2)
    head = step_flops(config, 0, TARGETS)
    assert shared - head == (step_flops(config, TOKENS, TARGETS) - head) / 2


def test_a_teachers_pass_is_what_torch_counts_of_a_forward_pass():
    model = random_qwen2("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        embeddings = torch.randn(1, TOKENS, model.config.hidden_size)
        model.lm_head(model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -TARGETS:])
    counts = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    assert teacher_flops(model.config.to_dict(), TOKENS, TARGETS) == counts["aten.mm"] + counts.get("aten.addmm", 0)


def test_a_whole_teacher_needs_half_a_step_more_and_cached_states_half_a_head_more():
    shape = random_qwen2().config.to_dict()
    run = {"steps": [{"tokens": 30, "computed_tokens": 20, "target_tokens": 5}] * 2}
    head = step_flops(shape, 0, 5) / step_flops(shape, 30, 5, 20)
    assert needed_price(shape, run, "none") == 1
    assert needed_price(shape, run, "whole") == 1.5
    assert needed_price(shape, run, "head") == pytest.approx(1 + head / 2)


def test_a_price_is_over_plain_and_a_bar_is_met_on_its_own_side():
    plain, slow = {"step_seconds": 2.0, "peak_bytes": 100}, {"step_seconds": 2.2, "peak_bytes": 106}
    assert prices(slow, plain) == {"price": 1.1, "peak_price": 1.06}
    assert prices({"failed": "x"}, plain) == {"price": None, "peak_price": None}
    found = {
        "cached": prices(slow, plain),
        "resident": {"ratio": 2.4, "peak_ratio": None},
        "streamed": {"price": 9.0},
    }
    assert [(bar["variant"], bar["figure"], bar["met"]) for bar in judged(found)] == [
        ("cached", "price", True),
        ("cached", "peak_price", False),
        ("resident", "ratio", False),
        ("resident", "peak_ratio", None),
    ]


def test_written_pairs_are_the_rows_of_plain_fine_tuning(tmp_path: Path, repo_root: Path):
    source, tokenizer = repo_root / "data/sample/train.jsonl", repo_root / "data/tiny-qwen2.5"
    pairs, answers = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in write_pairs(source, tmp_path, tokenizer, (30, 20), 3)
    )
    assert [row["messages"] for row in answers] == [p["prompt"] + p[side] for p in pairs for side in SIDES]
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    sizes = {key: [len(words.encode(p[key][0]["content"]).ids) for p in pairs] for key in ("prompt", *SIDES)}
    assert all(28 <= size <= 32 for size in sizes["prompt"])
    assert all(18 <= size <= 22 for side in SIDES for size in sizes[side])
    assert len({p[key][0]["content"] for p in pairs for key in sizes}) == 9


def test_a_line_is_found_again():
    found = fit({512: 1e9 + 512 * 3e5, 1024: 1e9 + 1024 * 3e5, 4096: 1e9 + 4096 * 3e5})
    assert found["static_bytes"] == pytest.approx(1e9)
    assert found["bytes_per_token"] == pytest.approx(3e5)
    assert found["curvature"] == pytest.approx(1)
    assert fit({512: 1e9})["bytes_per_token"] is None


@pytest.mark.parametrize("first", [64, 2048, 65536])
@pytest.mark.parametrize("granule", [1, 4096])
def test_the_search_comes_within_five_percent_of_the_longest_and_never_beyond(first: int, granule: int):
    static, slope, budget = 4e9, 2.5e5, 1.6e10
    most = int((budget - static) / slope)

    def attempt(length: int) -> tuple[int, float] | None:
        peak = static + slope * -(-length // granule) * granule
        return (int(peak), 0.0) if peak <= budget else None

    found = search(attempt, budget, first, 400_000, limit_seconds=60)
    assert 0.95 * (most - granule) <= found["tokens"] <= most
    assert len(found["tried"]) + len(found["failed_at"]) < 20


def test_the_search_tries_no_step_that_would_outlast_its_time_but_tells_what_to_expect():
    found = search(lambda length: (length, length**2 / 4096**2), 1e5, 1024, 400_000, limit_seconds=10)
    assert max(found["tried"]) < 4096 * 10**0.5 * 1.01
    assert found["tokens"] == max(found["tried"]) < found["predicted_tokens"] == 100_000
    assert found["extrapolated"]


def test_a_longest_context_that_was_trained_is_not_extrapolated():
    found = search(lambda length: (length, 0.0) if length <= 5000 else None, 1e5, 1024, 400_000, limit_seconds=60)
    assert 4750 <= found["tokens"] <= 5000 and not found["extrapolated"]


def test_a_gpu_benchmark_measures_the_most_important_first_in_steps_of_equal_tokens():
    names = [name for name, _ in gpu.planned(gpu.OPTIONS)]
    first, small = "all-linear:16 8192", "q_proj+v_proj:8"
    assert names[:3] == [f"ours fast {first}", f"stock packing {first}", f"ours fast {small} 8192"]
    order = [f"ours fast {small} 2048", "ours whole", "context 16", "distill ours", "load first", "ours fast/all"]
    order.append("context 24")
    places = [next(i for i, name in enumerate(names) if name.startswith(begin)) for begin in order]
    assert places == sorted(places) and len(set(names)) == len(names)
    assert [gpu.step_batch(gpu.OPTIONS, length) for length in (8192, 2048)] == [1, 4]
    with pytest.raises(SystemExit, match="parts=nonsense"):
        list(gpu.planned({**gpu.OPTIONS, "parts": "nonsense"}))


def test_no_run_of_a_gpu_benchmark_outlasts_its_time(monkeypatch: pytest.MonkeyPatch):
    work = Workload({**gpu.OPTIONS, "run_seconds": "100", "context_seconds": "50"}, Path(), {}, Path(), Path())
    assert gpu.limited(work, "ours", 500).limit_seconds == pytest.approx(100)
    assert gpu.limited(work, "ours", 500, first=True).limit_seconds == pytest.approx(200)
    assert gpu.limited(work, "context 16", 500).limit_seconds == pytest.approx(200)
    assert gpu.limited(work, "context 16", 30, first=True).limit_seconds == pytest.approx(30)
    limits: list[float] = []

    def measured(module: str, options: object, limit_seconds: float) -> dict:
        limits.append(limit_seconds)
        return {}

    monkeypatch.setattr("benchmarks.workload.measure", measured)
    for left in (30, 500):
        gpu.limited(replace(work, options={**work.options, "run_seconds": "1000"}), "ceiling", left).ceiling(64)
    assert limits == pytest.approx([30, 120])


def test_ratios_compare_with_the_best_of_each_and_ignore_what_failed():
    stock = {
        "fast": {"tokens_per_second": 40.0, "peak_bytes": 8},
        "small": {"tokens_per_second": 30.0, "peak_bytes": 4},
        "broken": {"failed": "out of memory"},
    }
    assert compare({"tokens_per_second": 200.0, "peak_bytes": 2}, stock) == {"ratio": 5.0, "peak_ratio": 0.5}
    assert compare({"failed": "x"}, stock) == {"ratio": None, "peak_ratio": None}


def test_warm_up_is_left_out_and_a_run_without_a_step_left_has_failed():
    step = {"seconds": 1.0, "tokens": 100, "target_tokens": 10}
    run = {"steps": [{**step, "seconds": 60.0}, step, step], "peak_bytes": 1, "start_seconds": 0.0}
    run |= {"load_peak_bytes": None, "train_peak_bytes": None}
    shape = random_qwen2().config.to_dict()
    assert run_figures(run, 1, shape)["tokens_per_second"] == 100
    assert "failed" in run_figures(run, 3, shape)
    assert medians([{"failed": "a"}, {"x": 1.0}, {"x": 3.0}]) == {"x": 2.0, "runs": 2}


def test_the_ceiling_is_the_best_product_by_its_median_not_by_its_luckiest_moment():
    ceiling = ceiling_of([{"a": 1.0, "b": 2.0}, {"a": 9.0, "b": 2.1}, {"a": 1.1, "b": 2.2}])
    assert (ceiling["product"], ceiling["flops_per_second"], ceiling["measurements"]) == ("b", 2.1, 3)
