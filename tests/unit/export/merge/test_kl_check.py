"""The KL check measures the distance of the merged from the trained model, reports it and can fail the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.config.command_options import MergeOptions
from finetune.config.overrides import read_options
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.export.merge import merge as merging
from finetune.export.merge.merge import KlCheckFailed, MergeReport, merge
from finetune.models.adapters.files import load_adapter
from finetune.models.load import load_base
from finetune.system.errors import ConfigError
from tests.unit.export.conftest import no_progress

ROWS = [list(range(3 + i, 33 + 7 * i % 40)) for i in range(6)]


@pytest.fixture
def trained(make_base, make_adapter, tmp_path) -> Path:
    """An adapter in a run folder whose held-out set is a file of token ids."""
    adapter = make_adapter("all linears")
    rows = tmp_path / "heldout.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    (adapter / "config.yaml").write_text(
        f"model: {{name: {make_base()}}}\ndata:\n  train: [{{path: gone.jsonl}}]\n"
        f"  eval: [{{path: {rows}, format: tokens}}]\n  train_on: all\n"
    )
    return adapter


def run(adapter: Path, out: Path, *words: str) -> MergeReport:
    options = read_options(MergeOptions, [f"adapter={adapter}", f"out={out}", *words], "finetune merge")
    return merge(options, lambda text: None, no_progress)


def log_probs(model, vocabulary: int = 300) -> list[Tensor]:
    """Return fp64 log-probabilities [T - 1, V] of each row, over the ids that the tokenizer knows."""
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0, :-1, :vocabulary].double().log_softmax(-1) for row in ROWS]


def test_kl_and_perplexity_equal_a_plain_comparison_of_both_models(trained, make_base, tmp_path):
    report = run(trained, tmp_path / "out")
    base = load_base(ModelConfig(name=str(make_base()), attention="sdpa"), QuantConfig(), device="cpu")
    before = log_probs(load_adapter(base, trained))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    after = log_probs(merged)
    tokens = sum(len(row) - 1 for row in ROWS)
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)) / tokens
    (check,) = report.kl_checks
    assert check.tokens == tokens
    # bf16 products differ between attention kernels.
    assert check.kl == pytest.approx(kl, rel=0.05)
    nll = (
        -sum(float(p[range(len(row) - 1), row[1:]].sum()) for p, row in zip(log_probs(merged, 320), ROWS, strict=True))
        / tokens
    )
    assert check.perplexity_merged == pytest.approx(float(torch.tensor(nll).exp()), rel=0.02)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["kl_checks"][0]["kl"] == check.kl


def test_a_merge_into_the_weights_that_training_saw_is_nearer(trained, tmp_path):
    (near,) = run(trained, tmp_path / "dequantized", "base=dequantized", "dtype=fp32").kl_checks
    (far,) = run(trained, tmp_path / "original", "base=original", "dtype=fp32").kl_checks
    assert near.kl < 0.01 * far.kl


def test_a_distance_above_the_limit_fails_and_a_higher_limit_reuses_the_weights(trained, tmp_path, monkeypatch):
    with pytest.raises(KlCheckFailed, match=r"kl_check\.max_kl=1e-09") as caught:
        run(trained, tmp_path / "out", "kl_check.max_kl=1e-9")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merging, "write_shard", lambda *_: pytest.fail("weights were written again"))
    run(trained, tmp_path / "out", "kl_check.max_kl=100")
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("words", [["kl_check.max_kl=1"], ["kl_check.max_kl=1", "kl_check.num_examples=0"]])
def test_a_limit_without_held_out_examples_is_refused(words, make_adapter, tmp_path):
    adapter = make_adapter("q,v")
    with pytest.raises(ConfigError, match=r"kl_check\.max_kl=1\b"):
        run(adapter, tmp_path / "out", *words)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("gate.max_kl", "kl_check.max_kl"), ("gate.rows", "kl_check.num_examples"), ("compare", "kl_check")],
)
def test_an_old_key_is_answered_with_the_new_one(old, new, tmp_path):
    with pytest.raises(ConfigError, match=f"{old}: .*{new}"):
        run(tmp_path, tmp_path / "out", f"{old}=1")


def test_unreadable_held_out_examples_are_refused_before_anything_is_written(trained, tmp_path):
    (tmp_path / "heldout.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"heldout\.jsonl"):
        run(trained, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_examples_and_their_number_can_be_chosen(trained, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n")
    assert run(trained, tmp_path / "a", "kl_check.num_examples=2").kl_checks[0].rows == 2
    check = run(trained, tmp_path / "b", f"kl_check.data=[{{path: '{other}', format: tokens}}]").kl_checks[0]
    assert (check.rows, check.tokens, check.source) == (1, 2, "other")
    assert run(trained, tmp_path / "c", "kl_check.num_examples=0").kl_checks == []


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ("distill: {objective: recover}", "dequantized"),
        ("lora: {init: loftq}", "dequantized"),
        ("lora: {rank: 4}", "original"),
        ("distill: {objective: recover}\nquant: {type: none}", "original"),
    ],
)
def test_base_auto_follows_from_the_objective_of_the_adapter(settings, base, trained, tmp_path):
    with (trained / "config.yaml").open("a") as config:
        config.write(settings + "\n")
    assert run(trained, tmp_path / "out", "kl_check.num_examples=0").base == base
