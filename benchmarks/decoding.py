"""Measure generation of an NF4 model with an adapter: prompts and tokens, ours against transformers.

    python -m benchmarks.decoding [size=0.5B] [tokenizer=FOLDER] [batches=1,8,32] [prompt=128] [tokens=8] [repeats=3]

ours          the generation of evaluation and on-policy distillation
resident      the same with `quant.keep_dequantized=true`: weights are dequantized once, as in `finetune chat` on a CPU
transformers  PEFT and `generate` on layers of bitsandbytes
+fp32         loaded and computed in fp32, on a CPU without bf16 instructions

All alternate in fresh processes, greedy, with the same random prompts of one length; no answer ends before `tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.figures import medians
from benchmarks.models import write_random_model
from benchmarks.peaks import peak_bytes
from benchmarks.processes import device, measure, parse, work_folder
from benchmarks.stock import load_model

DEFAULTS = {
    "size": "0.5B",
    "tokenizer": "data/tiny-qwen2.5",
    "batches": "1,8,32",
    "prompt": "128",
    "tokens": "8",
    "repeats": "3",
    "minutes": "10",
    "work": "",
    "results": "benchmarks/results",
    "model": "",
    "side": "",
}
COLUMNS = (
    ("prompts s", "prompt_seconds", 1.0, ",.2f"),
    ("a token s", "token_seconds", 1.0, ",.3f"),
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
)
_ADAPTER: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# (prompts [B, L], number of new tokens) -> the time at which the logits of each token were ready.
Write = Callable[[Any, int], list[float]]


def by_us(folder: str, resident: bool) -> Write:
    """Build the generation of our evaluations."""
    import torch
    from peft import LoraConfig, get_peft_model

    from finetune.config.schema import ModelConfig, QuantConfig
    from finetune.data.encoded import Prompt
    from finetune.evaluation.generation import decode, greedy
    from finetune.models.fused import fuse_layers
    from finetune.models.load import load_base

    base = load_base(ModelConfig(name=folder), QuantConfig(keep_dequantized=resident))
    model = get_peft_model(base, LoraConfig(**_ADAPTER)).eval()
    fuse_layers(model)
    vocabulary = base.config.vocab_size

    def write(prompts_BL: Any, tokens: int) -> list[float]:
        moments: list[float] = []

        def choose(logits_NV: Any, *which: Any) -> Any:
            chosen = greedy(logits_NV, *which)
            chosen.tolist()  # waits for a GPU
            moments.append(time.perf_counter())
            return chosen

        with torch.no_grad():
            rows = [Prompt(prompt.numpy()) for prompt in prompts_BL.cpu()]
            decode(model, rows, [tokens] * len(rows), choose, stop_ids=frozenset(), vocabulary=vocabulary)
        return moments

    return write


def by_transformers(folder: str, dtype: Any) -> Write:
    """Build `generate` of a PeftModel."""
    import torch
    from peft import LoraConfig, get_peft_model

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = get_peft_model(load_model(folder, kind, dtype), LoraConfig(**_ADAPTER)).eval()

    def write(prompts_BL: Any, tokens: int) -> list[float]:
        moments: list[float] = []

        def note(ids: Any, scores: Any) -> Any:
            scores.argmax(-1).tolist()  # waits for a GPU
            moments.append(time.perf_counter())
            return scores

        prompts_BL = prompts_BL.to(model.device)
        model.generate(
            input_ids=prompts_BL,
            attention_mask=torch.ones_like(prompts_BL),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            logits_processor=[note],
        )
        return moments

    return write


def one_side(options: dict[str, str]) -> dict[str, dict[str, float]]:
    """Measure generation in this process, by number of prompts."""
    import torch

    side, folder, tokens = options["side"], options["model"], int(options["tokens"])
    if side in ("ours", "resident"):
        write = by_us(folder, side == "resident")
    else:
        write = by_transformers(folder, torch.float32 if side.endswith("+fp32") else torch.bfloat16)
    found = {}
    for count in map(int, options["batches"].split(",")):
        torch.manual_seed(count)
        prompts_BL = torch.randint(0, 1000, (count, int(options["prompt"])))
        write(prompts_BL, 1)  # compiles the kernels of these shapes
        began = time.perf_counter()
        moments = write(prompts_BL, 1 + tokens)
        token_seconds = median(later - earlier for earlier, later in pairwise(moments))
        found[str(count)] = {
            "prompt_seconds": moments[0] - began,
            "token_seconds": token_seconds,
            "tokens_per_second": count / token_seconds,
            "peak_bytes": peak_bytes(),
        }
    return found


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    if options["side"]:
        print(json.dumps(one_side(options)))
        return
    here = device()
    sides = ["ours", "resident", "transformers", *(["transformers+fp32"] if here["multiplies_in"] == "float32" else [])]
    folder = work_folder(options["work"]) / f"qwen2.5-{options['size']}"
    options["model"] = str(write_random_model(options["size"], Path(options["tokenizer"]), folder))
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(int(options["repeats"])):
        for side in sides:
            run = measure("benchmarks.decoding", {**options, "side": side}, 60 * float(options["minutes"]))
            counts = options["batches"].split(",")
            lines = {f"{side} {count}": run if "failed" in run else run[count] for count in counts}
            report.log(report.table(lines, COLUMNS))
            for name, figures in lines.items():
                runs[name].append(figures)
    summary = report.heading("decoding", {k: v for k, v in options.items() if k not in ("model", "side")}, here)
    summary["sides"] = {name: medians(done) for name, done in runs.items()}
    report.write(report.results_file("decoding", options, here), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
