"""Laws of learning from preferences: packed = alone, two ranks = one, resumed = unbroken, cached = computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from finetune import MergeOptions, load_config, merge, train
from finetune.config.schema import PreferenceConfig, RunConfig
from finetune.data.batch import build_batch
from finetune.data.loader import load_chat_template, load_data
from finetune.data.tokens.prepare import Preparation
from finetune.models.adapters.attach import attach_lora
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.objectives.preference import PreferenceLoss
from finetune.system.resources import packaged
from tests.commands import run_here, train_on_ranks
from tests.runs import adapter, check_same_metrics, metrics, reference_run

STEPS = 4
SMALL = (
    "data.train.0.limit=24",
    "data.eval.0.limit=8",
    "train.batch_size=3",
    "train.learning_rate=2e-3",
    "lora.target_modules=[q_proj,v_proj]",
    "data.packing=false",
    f"train.max_steps={STEPS}",
    "train.eval_every=2",
)
FP32 = ("model.dtype=float32", "quant.compute_dtype=float32")


def small(folder: Path, *overrides: str) -> RunConfig:
    return load_config("dpo.yaml", [*SMALL, f"output_dir={folder}", *overrides])


def evaluated(folder: Path) -> dict[str, float]:
    """The figures of the last evaluation."""
    return {name: value for name, value in metrics(folder)[-1].items() if name.startswith("eval/")}


def check_close(found: Path, expected: Path, rel: float) -> None:
    for name, tensor in adapter(expected).items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(adapter(found)[name], tensor, rtol=rel, atol=rel * scale, msg=name)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_packed_pairs_and_shared_prompts_equal_pairs_alone(objective, tmp_path):
    """Loss and gradients of five pairs in one batch are those of the pairs one by one, without any sharing."""
    cfg = small(tmp_path, *FP32, "quant.type=none")
    chat = load_chat_template(cfg.data, load_tokenizer(cfg.model))
    documents = list(load_data(Preparation(cfg.data, chat, objective=objective)).documents[:5])
    torch.manual_seed(0)
    model = attach_lora(load_base(cfg.model, cfg.quant, "cpu"), cfg.lora)
    fuse_layers(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    reference = torch.linspace(-60, -20, 10)  # of the answers, in order

    def result(batches: list, references: list) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for some, of_answers in zip(batches, references, strict=True):
            loss = PreferenceLoss(model, PreferenceConfig(objective=objective), lambda _, r=of_answers: r)
            value = loss(some)
            value.backward()
            total += value.item()
        return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    alone = result([build_batch([d]) for d in documents], list(reference.split(2)))
    shared = build_batch(documents, share_prefixes=True)
    assert shared.rows < shared.tokens, "nothing is shared"
    packed = result([shared], [reference])
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    for found, expected in zip(packed[1], alone[1], strict=True):
        # Sums of about 1,000 fp32 products in another order: sqrt(1000) * 2**-24 = 2e-6.
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_two_ranks_equal_one(tmp_path):
    """Seven rows in steps of three: one rank has none in the last step of an epoch; kto's divergence is global."""
    settings = (*SMALL, *FP32, "preference.objective=kto", "data.train.0.limit=7")
    train(load_config("dpo.yaml", [*settings, f"output_dir={tmp_path / '1'}", "train.world_size=1"]))
    train_on_ranks(2, *settings, f"output_dir={tmp_path / '2'}", "train.world_size=2", config="dpo.yaml")
    # Adam turns a sum's last bits into an error of the weight's own size.
    check_close(tmp_path / "2", tmp_path / "1", 1e-4)
    check_same_metrics(tmp_path / "1", tmp_path / "2")


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(small(whole, "preference.objective=kto"))
    train(small(broken, "preference.objective=kto", "train.max_steps=2"))
    train(small(broken, "preference.objective=kto", "train.resume=auto"))
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(broken)[name], tensor), name


def test_a_cached_reference_trains_the_same_adapter(tmp_path, capsys):
    cache = f"preference.cache={tmp_path / 'reference'}"
    done = run_here("cache", "config=dpo.yaml", *SMALL, *FP32, cache, f"output_dir={tmp_path / 'x'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train(small(tmp_path / "live", *FP32))
    capsys.readouterr()
    train(small(tmp_path / "cached", *FP32, cache, "preference.reference=cached"))
    check_close(tmp_path / "cached", tmp_path / "live", 1e-4)
    assert capsys.readouterr().err.count("reference_kl") == 1, "the figure that a cache cannot give is named once"
    live, cached = (evaluated(tmp_path / name) for name in ("live", "cached"))
    assert live.keys() - cached.keys() == {"eval/pairs-heldout/reference_kl"} and not cached.keys() - live.keys()


def test_the_reference_of_a_continued_adapter_is_that_adapter(tmp_path):
    adapter_folder = reference_run("lora.dropout=0", "train.neftune_alpha=0")
    start = (f"lora.init_adapter={adapter_folder}", "preference.sft_weight=null")
    train(small(tmp_path / "initial", *start))
    first = metrics(tmp_path / "initial")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are equal before the first step"
    train(small(tmp_path / "base", *start, "preference.reference=base"))
    assert abs(metrics(tmp_path / "base")[0]["loss"] - math.log(2)) > 1e-3


def test_the_distance_from_the_reference_is_0_until_something_is_learned(tmp_path):
    """Pairs count with their chosen answer, verdicts with the answer that they have."""
    pairs = packaged("data") / "sample" / "pairs-heldout.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:4]]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    sets = f"data.eval=[{{path: {pairs}, limit: 4}}, {{path: {tmp_path / 'bad.jsonl'}}}]"
    start = f"lora.init_adapter={reference_run('lora.dropout=0', 'train.neftune_alpha=0')}"
    words = ("preference.objective=kto", "train.eval_every=1", "train.max_steps=1", "train.learning_rate=1e-30")
    train(small(tmp_path / "run", *words, start, sets))
    found = {name: value for name, value in evaluated(tmp_path / "run").items() if name.endswith("/reference_kl")}
    assert found == {"eval/pairs-heldout/reference_kl": 0.0, "eval/bad/reference_kl": 0.0}


def test_an_adapter_of_pairs_is_merged_and_compared_on_its_chosen_answers(tmp_path):
    train(small(tmp_path / "run", "train.max_steps=2"))
    report = merge(MergeOptions(adapter=str(tmp_path / "run"), out=str(tmp_path / "merged")))
    [check] = report.kl_checks
    assert check.source == "pairs-heldout" and check.kl < 0.05
