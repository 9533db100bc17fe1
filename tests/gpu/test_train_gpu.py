"""A GPU computes what the CPU computes, and runs on both end alike."""

from __future__ import annotations

import pytest
import torch

from finetune import train
from finetune.data.batch import build_batch
from finetune.losses.cross_entropy import CrossEntropy
from tests.models import random_qwen2
from tests.parity.test_cross_entropy import documents
from tests.parity.test_fused_layers import check_close
from tests.runs import differing, metrics, small_run

pytestmark = pytest.mark.gpu


def test_loss_and_gradients_on_the_gpu_equal_the_cpus():
    batch = build_batch(documents([5, 70, 2, 64, 9, 300]))
    gradients = {}
    for device in ("cpu", "cuda"):
        model = random_qwen2().to(device)
        CrossEntropy(model)(batch).backward()
        gradients[device] = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    # fp32 without TF32, sums over thousands of terms in another order.
    check_close(gradients["cuda"], gradients["cpu"], 1e-4)


@pytest.mark.parametrize("recompute", ["none", "all", "offload", "auto"])
def test_a_run_learns_resumes_and_reports_gpu_memory(tmp_path, recompute):
    settings = (
        "train.max_steps=12",
        "train.save_every=4",
        f"train.gradient_checkpointing={recompute}",
        "train.eval_every=12",
    )
    result = train(small_run(tmp_path, *settings, "data.train.0.limit=8"))
    assert result.status == "finished" and result.peak_bytes == torch.cuda.max_memory_allocated()
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < losses[0]
    again = train(small_run(tmp_path, *settings, "data.train.0.limit=8", "train.resume=auto"))
    assert again.eval_loss == pytest.approx(result.eval_loss, rel=1e-3)
    assert differing(tmp_path, tmp_path / "checkpoint-12") == []
