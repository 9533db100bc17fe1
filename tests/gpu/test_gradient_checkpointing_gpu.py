"""On a GPU, checkpointing lowers peak memory, offloading lowers it further, and no gradient changes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.data.batch import build_batch
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models.fused import fuse_layers
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.ops import attention
from tests.parity.test_cross_entropy import documents

pytestmark = pytest.mark.gpu


def step(setting: str | int, fused: bool) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Return peak bytes above the model, allocated and reserved, and gradients, of the second of two equal steps."""
    attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation=attention.SEGMENTED,
    )
    base = Qwen2ForCausalLM(config).bfloat16().requires_grad_(False).cuda()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    if fused:
        fuse_layers(model)
    apply_gradient_checkpointing(model, setting)
    batch = build_batch(documents([2000, 1500, 500]))
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        CrossEntropy(model)(batch).backward()
        torch.cuda.synchronize()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - reserved, gradients


@pytest.mark.parametrize("fused", [True, False])
def test_the_peak_falls_from_none_to_some_to_all_to_offload(fused):
    measured = {setting: step(setting, fused) for setting in ("none", 6, "all", "offload")}
    peaks = [peak for peak, _, _ in measured.values()]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4, peaks
    # Eleven inputs of 4,000 tokens in bf16, of which at most three are on the GPU at a time.
    assert peaks[2] - peaks[3] >= 6 * 4000 * 512 * 2
    # The host queues all layers before the GPU ends the first one; offloading then reserves no input for each of them.
    assert measured["all"][1] - measured["offload"][1] >= 6 * 4000 * 512 * 2
    expected = measured["none"][2]
    for setting, (_, _, gradients) in measured.items():
        for name, gradient in gradients.items():
            # Where the kernels sum in one order the bits are the same; attention's backward may use atomics.
            torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-4, msg=f"{setting}: {name}")
