"""`finetune eval` on a GPU: fused layers and cached decoding give the figures of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.commands.eval import write_merged
from finetune.config.command_options import EvalOptions
from finetune.config.overrides import read_options
from finetune.evaluation.compare import evaluate_gap
from finetune.system.accelerator import default_device
from finetune.system.resources import packaged

pytestmark = pytest.mark.gpu
BASE = packaged("data") / "tiny-qwen2.5"


def test_a_model_and_its_quantized_version_are_measured(tmp_path: Path) -> None:
    lines = (packaged("data") / "sample" / "heldout.jsonl").read_text().splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    words = [f"model={BASE}", f"data=[{{path: {tmp_path / 'rows.jsonl'}}}]", "quant=nf4", "answers=8", "resamples=100"]
    table = evaluate_gap(read_options(EvalOptions, words, "finetune eval"), lambda text: None, write_merged, tmp_path)
    base, quantized = (model.sets[0].figures for model in table.models)

    device = default_device()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    nats, tokens = 0.0, 0
    for line in lines:
        turns = json.loads(line)["messages"]
        asked = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False))
        whole = tokenizer.apply_chat_template(turns, return_dict=False)[:-1]  # without the line's end after the answer
        with torch.no_grad():
            logits = model(torch.tensor([whole], device=device)).logits[0].double()
        nats -= float(logits.log_softmax(-1)[range(asked - 1, len(whole) - 1), whole[asked:]].sum())
        tokens += len(whole) - asked
    # bf16 products differ between kernels: a logit's last bit is 0.0625 at 16.
    assert base["loss"].value == pytest.approx(nats / tokens, rel=0.02)
    assert 0 < quantized["kl"].value < 0.05 < quantized["kl_p99"].value < 1
    assert quantized["top1"].value > 0.9 and table.models[1].stored_bytes < 0.4 * table.models[0].stored_bytes
