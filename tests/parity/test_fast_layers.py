"""The fast path against PEFT's own: values and gradients of a whole model, for every adapter it knows and those it does not."""

from __future__ import annotations

import peft
import pytest
import torch

from finetune.data.batch import build_batch
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models.fast import FastDecoderLayer, attach_fast_path
from tests.models import random_qwen2
from tests.parity.test_cross_entropy import documents

LENGTHS = [5, 70, 2, 64, 9, 130, 1]
KINDS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all linears": {"target_modules": "all-linear"},
    "down alone": {"target_modules": ["down_proj"]},
    "up and o": {"target_modules": ["up_proj", "o_proj"]},
    "rank 1": {"r": 1, "target_modules": ["q_proj", "k_proj"]},
    "rslora": {"use_rslora": True, "target_modules": ["v_proj", "gate_proj"]},
    "dropout": {"lora_dropout": 0.3, "target_modules": "all-linear"},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "first layer only": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "last layer only": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj", "lm_head"]},
}


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{**{"lora_alpha": 8}, **KINDS[kind]}) if "r" not in KINDS[
        kind
    ] else peft.LoraConfig(task_type="CAUSAL_LM", lora_alpha=8, **KINDS[kind])
    model = peft.get_peft_model(random_qwen2(dtype=dtype), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def step(model: torch.nn.Module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    loss = CrossEntropy(model)(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_pefts(kind: str, recompute: bool):
    batch = build_batch(documents(LENGTHS))
    plain, fast = adapted(kind), adapted(kind)
    attach_fast_path(fast)
    if recompute:
        fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, expected_gradients = step(plain, batch)
    found, gradients = step(fast, batch)
    assert sum(isinstance(m, FastDecoderLayer) for m in fast.modules()) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        # Sums over a few hundred tokens in another order, in fp32.
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
