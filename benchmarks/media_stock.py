"""Train on rows with pictures by transformers, PEFT and bitsandbytes in a plain loop, without our code.

    python -m benchmarks.media_stock model=FOLDER rows=MESSAGES.jsonl [steps=4] [batch=4] [checkpointing=false]

The towers run in each step. Answers are the targets. Seconds are those of forward, backward and optimizer; pictures are
decoded and cut into patches outside of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peaks import Peaks
from benchmarks.processes import parse

DEFAULTS = {"model": "", "rows": "", "steps": "4", "batch": "4", "rank": "8", "checkpointing": "false"}
_TARGETS = r"model\.language_model\..*\.(q_proj|v_proj)"


def encode(rows: list[dict[str, Any]], folder: Path, model: Path, image_token: int) -> dict[str, Any]:
    """Return the arguments of the model's forward, padded on the right, with labels."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, processor = AutoTokenizer.from_pretrained(model), Qwen2VLImageProcessorPil()
    pictures = [Image.open(folder / row["images"][0]).convert("RGB") for row in rows]
    pixels = processor(images=pictures, return_tensors="pt")
    examples = []
    for row, grid in zip(rows, pixels["image_grid_thw"], strict=True):
        question, answer = (message["content"] for message in row["messages"])
        parts = [{"type": "image"}, {"type": "text", "text": question.replace("<image>", "")}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, return_dict=False
        )
        at, count = prompt.index(image_token), int(grid.prod()) // 4
        prompt = [*prompt[:at], *[image_token] * count, *prompt[at + 1 :]]
        target = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append((prompt + target, [-100] * len(prompt) + target))
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in examples]),
        "mm_token_type_ids": (ids == image_token).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def main(words: list[str]) -> None:
    began = time.perf_counter()
    options = parse(words, DEFAULTS)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

    peaks, folder, file = Peaks(), Path(options["model"]), Path(options["rows"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.visual"],
    )
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": place}
    )
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":  # its packed weights have no backward
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    if options["checkpointing"] == "true":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=int(options["rank"]), lora_alpha=16, target_modules=_TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    rows, batch = [json.loads(line) for line in file.read_text().splitlines()], int(options["batch"])
    steps, started = [], time.perf_counter() - began
    peaks.training_begins()
    for step in range(int(options["steps"])):
        some = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        inputs = {
            name: x.to(place) for name, x in encode(some, file.parent, folder, base.config.image_token_id).items()
        }
        start = time.perf_counter()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        targets = int((inputs["labels"] >= 0).sum())
        tokens = int(inputs["attention_mask"].sum())
        seconds = time.perf_counter() - start
        steps.append({"seconds": seconds, "tokens": tokens, "target_tokens": targets, "loss": value})
    print(json.dumps({**peaks.figures(), "steps": steps, "start_seconds": started}))


if __name__ == "__main__":
    main(sys.argv[1:])
