"""Losses on preferences equal those of TRL's trainers, in value and in every gradient of the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finetune.config.sections import PreferenceConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.preference import answer_log_probs
from finetune.models.fused import fuse_layers
from finetune.objectives.preference import PreferenceLoss, PreferenceSetup
from finetune.ops import attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = [
    {"prompt": "Name a colour.", "chosen": " It is red.", "rejected": " It is a very blue one."},
    {"prompt": "Name a colour.", "chosen": " Green, of course!", "rejected": " No."},
    {"prompt": "Say two words about the sea", "chosen": " deep blue", "rejected": " two words and more"},
]
VERDICTS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
# TRL's ORPO takes the cross-entropy over prompt and answer, by tokens of the batch; the paper over the answer. With one
# pair and a prompt of one token, which nothing predicts, both are the same.
ONE_TOKEN = [{"prompt": "x", "chosen": " It is red.", "rejected": " It is a very blue one."}]
ROWS = {"kto": VERDICTS, "orpo": ONE_TOKEN}
COMMON: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_length": None,
    "beta": 0.3,
}


LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def fill(model: torch.nn.Module) -> None:
    """Set an adapter that is neither new nor symmetric."""
    torch.manual_seed(3)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.05)


def adapted(base: Path) -> peft.PeftModel:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention.SEGMENTED)
    model = peft.get_peft_model(model, LORA)
    fill(model)
    return model


def trainer_of(kind: str, base: Path, folder: Path, rows: list[dict[str, Any]]) -> Any:
    """Build TRL's trainer for one batch of all rows."""
    settings = {**COMMON, "output_dir": str(folder), "per_device_train_batch_size": len(rows)}
    config, trainer, own = {
        "dpo": (DPOConfig, DPOTrainer, {"loss_type": "sigmoid"}),
        "ipo": (DPOConfig, DPOTrainer, {"loss_type": "ipo"}),
        "orpo": (ORPOConfig, ORPOTrainer, {}),
        "simpo": (CPOConfig, CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}),
        "kto": (KTOConfig, KTOTrainer, {"desirable_weight": 1.2, "undesirable_weight": 0.7}),
    }[kind]
    if kind == "kto":
        own["train_sampling_strategy"] = "sequential"
    options = {k: v for k, v in {**settings, **own}.items() if k in config.__dataclass_fields__}
    # The reference of an adapter that TRL gets is that adapter; of one that TRL makes it is the base.
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
        args=config(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LORA,
    )
    fill(made.model)
    return made


def document(prompt: list[int], answer: list[int]) -> Document:
    ids = np.array([*prompt, *answer], np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(prompt) - 1 : -1] = answer
    return Document(ids, labels, "row")


def row_of(chosen: Document | None, rejected: Document | None) -> Document:
    sides = [side for side in (chosen, rejected) if side is not None]
    ids, labels = (np.concatenate([getattr(side, key) for side in sides]) for key in ("ids", "labels"))
    return Document(ids, labels, "row", chosen_tokens=0 if chosen is None else len(chosen))


def our_rows(kind: str, trainer: Any) -> list[Document]:
    """The rows as TRL tokenized them."""
    rows = []
    for row in trainer.train_dataset:
        if kind == "kto":
            one = document(row["prompt_ids"], row["completion_ids"])
            rows.append(row_of(one, None) if row["label"] else row_of(None, one))
        elif kind in ("dpo", "ipo"):
            rows.append(row_of(*(document(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))))
        else:
            sides = []
            for side in ("chosen", "rejected"):
                ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
                start = next(i for i, label in enumerate(labels) if label != -100)
                sides.append(document(ids[:start], ids[start:]))
            rows.append(row_of(*sides))
    return rows


def our_result(base: Path, cfg: PreferenceConfig, rows: list[Document], share: bool) -> tuple[float, dict[str, Any]]:
    model = adapted(base)
    fuse_layers(model)

    def reference() -> Any:
        return model.disable_adapter()

    def log_probs(batch: Any) -> torch.Tensor:
        with torch.no_grad(), reference():
            return answer_log_probs(model, batch)[0]

    setup = PreferenceSetup(cfg, PreferenceLoss(model, cfg, log_probs), reference)
    setup.estimate_divergence(rows, slice(None), limit_tokens=64, sum_over_ranks=lambda sums: sums)
    loss = setup.loss(build_batch(rows, share_prefixes=share)) / setup.count(rows)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_loss_and_gradients_are_those_of_trl(kind: str, share: bool, base: Path, tmp_path: Path):
    rows = ROWS.get(kind, PAIRS)
    trainer = trainer_of(kind, base, tmp_path, rows)
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()
    wanted = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    settings = {"simpo": {"gamma": 0.4}, "kto": {"desirable_weight": 1.2, "undesirable_weight": 0.7}}.get(kind, {})
    cfg = PreferenceConfig(objective=kind, beta=0.3, **settings)
    loss, gradients = our_result(base, cfg, our_rows(kind, trainer), share)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
