"""The baseline: QLoRA with TRL, PEFT and bitsandbytes as their documentation shows it, nothing of ours.

    python -m benchmarks.stock model=FOLDER rows=MESSAGES.jsonl variant=padded [steps=4] [length=512] [batch=4]

Seconds are those of `training_step` (forward and backward), so the optimizer and the data loader cost it nothing here.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

from benchmarks.peaks import Peaks
from benchmarks.processes import parse

DEFAULTS = {
    "model": "", "rows": "", "variant": "padded", "steps": "4", "length": "512", "batch": "4", "rank": "8",
    "targets": "q_proj,v_proj", "lora_dropout": "0.0", "seed": "0",
}  # fmt: skip
# Keys of SFTConfig that make each variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False, "gradient_checkpointing": False},
    "packing": {"packing": True, "gradient_checkpointing": False},
    "packing+checkpointing": {"packing": True, "gradient_checkpointing": True},
    "liger": {"packing": True, "gradient_checkpointing": True, "use_liger_kernel": True},
    "unsloth": {"packing": True, "gradient_checkpointing": False},  # it brings its own checkpointing
}
STOCK = ("padded", "packing", "packing+checkpointing")
# Variants of other projects, each with the package it needs.
PEERS = {"liger": "liger_kernel", "unsloth": "unsloth", "llama-factory": "llamafactory"}


def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported to see it."""
    return find_spec(package) is not None


def load_model(path: str, device: str) -> Any:
    """NF4 with double quantisation and bf16 compute, through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Packed rows need an attention that keeps documents apart; TRL's documentation names this one.
    attention = {"attn_implementation": "flash_attention_2"} if device == "cuda" and installed("flash_attn") else {}
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantisation, dtype=torch.bfloat16,
        device_map={"": 0} if device == "cuda" else None, **attention,
    )  # fmt: skip


def build_trainer(options: dict[str, str], device: str, output: str) -> Any:
    """An SFTTrainer over the rows; the loss is on the last turn's answer."""
    variant = options["variant"]
    rank, targets = int(options["rank"]), options["targets"]
    target_modules = targets if targets == "all-linear" else targets.split(",")
    extra: dict[str, Any] = {}
    if variant == "unsloth":
        from unsloth import FastLanguageModel  # before trl: it patches what is imported after it

        model, _ = FastLanguageModel.from_pretrained(
            options["model"], max_seq_length=int(options["length"]), load_in_4bit=True, dtype=None
        )
        model = FastLanguageModel.get_peft_model(
            model, r=rank, lora_alpha=16, target_modules=target_modules, use_gradient_checkpointing="unsloth"
        )
    else:
        from peft import LoraConfig

        model = load_model(options["model"], device)
        extra["peft_config"] = LoraConfig(
            r=rank, lora_alpha=16, target_modules=target_modules, task_type="CAUSAL_LM",
            lora_dropout=float(options["lora_dropout"]),
        )  # fmt: skip
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def split_last(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    rows = load_dataset("json", data_files=options["rows"], split="train").map(split_last, remove_columns=["messages"])
    arguments = SFTConfig(
        output_dir=output, max_steps=int(options["steps"]), per_device_train_batch_size=int(options["batch"]),
        max_length=int(options["length"]), learning_rate=2e-4, bf16=True, use_cpu=device == "cpu", logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=int(options["seed"]), **VARIANTS[variant],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **extra)


def watch_steps(trainer: Any, device: str) -> list[dict[str, float]]:
    """Wraps `training_step`; the list fills with seconds, real tokens and target tokens of each."""
    import torch

    steps: list[dict[str, float]] = []
    inner = trainer.training_step

    def timed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask, labels = inputs.get("attention_mask"), inputs["labels"]
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        targets = int((labels != -100).sum())
        start = time.perf_counter()
        loss = inner(model, inputs, *args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        steps.append({"seconds": time.perf_counter() - start, "tokens": tokens, "target_tokens": targets})
        return loss

    trainer.training_step = timed
    return steps


def main(words: list[str]) -> None:
    began = time.perf_counter()
    options = parse(words, DEFAULTS)
    if options["variant"] == "unsloth":
        import unsloth  # noqa: F401 - before torch's friends: it patches what is imported after it
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = Peaks()
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(options, device, output)
        steps = watch_steps(trainer, device)
        start_seconds = time.perf_counter() - began
        peaks.training_begins()
        trainer.train()
    print(json.dumps({"steps": steps, "start_seconds": start_seconds, **peaks.figures()}))


if __name__ == "__main__":
    main(sys.argv[1:])
