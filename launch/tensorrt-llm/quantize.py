"""Quantize a merged model to FP8 with NVIDIA ModelOpt, for TensorRT-LLM.

usage: python3 quantize.py MERGED ROWS.jsonl OUT [--examples 512] [--tokens 2048] [--device cuda]

Runs in the container of TensorRT-LLM, which has ModelOpt. Each linear layer of the blocks gets one scale for its weight
and one for its inputs, which are measured on the rows: take those of the training. Rows have `messages` or `text`.
trtllm-serve reads the scheme in hf_quant_config.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def read_config(folder: Path) -> Any:
    """Return the config, with the rotary settings under the keys of transformers 4, which the container has.

    It ignores `rope_parameters` of transformers 5, and takes its own default instead.
    """
    config = AutoConfig.from_pretrained(folder)
    if rope := dict(getattr(config, "rope_parameters", None) or {}):
        config.rope_theta = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config.rope_scaling = rope
    return config


def read_ids(rows: Path, tokenizer: Any, tokens: int) -> Iterator[list[int]]:
    """Yield the first `tokens` ids of each row. Raises: SystemExit for a row without `messages` or `text`."""
    with rows.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "messages" in row:
                text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
            elif "text" in row:
                text = row["text"]
            else:
                raise SystemExit(f"{rows}:{number}: has neither messages nor text, found {', '.join(row)}")
            yield tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("merged", "rows", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: exists")

    tokenizer = AutoTokenizer.from_pretrained(options.merged)
    model = AutoModelForCausalLM.from_pretrained(
        options.merged, config=read_config(options.merged), torch_dtype=torch.bfloat16
    )
    model = model.to(options.device).eval()
    examples = list(islice(read_ids(options.rows, tokenizer, options.tokens), options.examples))

    def measure(model: torch.nn.Module) -> None:
        for ids in examples:
            model(torch.tensor([ids], device=options.device))

    with torch.no_grad():
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, measure)
        partial = options.out.with_name(f"{options.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        export_hf_checkpoint(model, export_dir=partial)
    for file in options.merged.iterdir():  # tokenizer and chat template, unchanged
        if file.is_file() and not file.name.startswith("model") and not (partial / file.name).exists():
            shutil.copy(file, partial)
    partial.rename(options.out)
    print(f"quantize: examples={len(examples)}, tokens={sum(map(len, examples)):,}, folder={options.out}")


if __name__ == "__main__":
    main()
