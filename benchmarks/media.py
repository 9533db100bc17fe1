"""Compare training on pictures with transformers and PEFT, and with training on text of the same length.

    python -m benchmarks.media [layers=4] [blocks=4] [side=448] [rows=8] [batch=4] [answer=64] [steps=5] [repeats=3]

A random Qwen2.5-VL with the widths of the 3B: `layers` of its 36 decoder layers and `blocks` of its 32 vision blocks.
Each row has one picture of `side` x `side` pixels, a short question, and an answer of about `answer` tokens. All run in
fresh processes, alternating. `pictures` reads the embeddings of its frozen tower from the cache, as every epoch after
the tower's one pass does; `computed` runs the tower in each step; `text` has words in place of the pictures. `stock` is
a plain loop, with and without gradient checkpointing. The first step of a run does not count.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.distill import Bar, judged, verdicts
from benchmarks.processes import device, measure, parse

DEFAULTS = {
    "layers": "4",
    "blocks": "4",
    "side": "448",
    "rows": "8",
    "batch": "4",
    "answer": "64",
    "steps": "5",
    "repeats": "3",
    "ours": "",
    "results": "benchmarks/results",
}
BARS: tuple[Bar, ...] = (
    ("pictures", "ratio", "at_least", 2.0),
    ("pictures", "peak_ratio", "at_most", 0.7),
    ("pictures", "price", "at_most", 1.1),
)
COLUMNS = (
    ("step s", "step_seconds", 1.0, ".2f"),
    ("tokens", "tokens", 1.0, ",.0f"),
    ("loss", "loss", 1.0, ".3f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("train GB", "train_peak_bytes", 1e-9, ".2f"),
    ("start s", "start_seconds", 1.0, ".1f"),
    ("x stock", "ratio", 1.0, ".2f"),
    ("of peak", "peak_ratio", 1.0, ".2f"),
    ("x text", "price", 1.0, ".3f"),
)
_WORDS = "one two three four five six seven eight nine ten red green blue".split()
_LIMIT_SECONDS = 1800.0


def write_model(folder: Path, layers: int, blocks: int) -> None:
    """Write a random model with a tokenizer and template of the family."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from benchmarks.processes import ROOT
    from tests.media_rows import media_tokenizer

    tokenizer = media_tokenizer("qwen2_5_vl", ROOT)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": blocks, "fullatt_block_indexes": [blocks - 1], "out_hidden_size": 2048},
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_rows(folder: Path, count: int, side: int, answer: int) -> tuple[Path, Path]:
    """Write rows with pictures of noise, and the same with as many words in place of each picture's embeddings."""
    import numpy as np
    from PIL import Image

    drawn = random.Random(0)
    embeddings = (side // 28) ** 2
    pictures, texts = [], []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        said = {"role": "assistant", "content": " ".join(drawn.choices(_WORDS, k=answer))}
        asked = {"role": "user", "content": "<image>What is this?"}
        pictures.append({"messages": [asked, said], "images": [f"{number}.png"]})
        words = {"role": "user", "content": " ".join([*drawn.choices(_WORDS, k=embeddings), "What is this?"])}
        texts.append({"messages": [words, said]})
    files = folder / "pictures.jsonl", folder / "text.jsonl"
    for file, rows in zip(files, (pictures, texts), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def figures_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run, without its first step."""
    if "failed" in run:
        return dict(run)
    counted = run["steps"][1:]
    figures: dict[str, Any] = {
        key: median(step[key] for step in counted) for key in ("seconds", "tokens", "target_tokens")
    }
    kept = {key: run[key] for key in ("peak_bytes", "train_peak_bytes", "start_seconds")}
    loss = run["steps"][0]["loss"]
    return {"step_seconds": figures.pop("seconds"), **figures, **kept, "loss": loss}


def summarize(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians per variant; the ratio is to the faster stock loop, the peak to the smaller one."""
    lines: dict[str, dict[str, Any]] = {}
    for name, done in runs.items():
        turns = [figures_of(run) for run in done]
        failed = next((turn for turn in turns if "failed" in turn), None)
        keys = () if failed else turns[0].keys()
        lines[name] = failed or {key: median(turn[key] for turn in turns) for key in keys}
    stock = [line for name, line in lines.items() if name.startswith("stock") and "failed" not in line]
    for name in ("pictures", "computed"):
        if "failed" in lines[name]:
            continue
        lines[name]["price"] = lines[name]["step_seconds"] / lines["text"]["step_seconds"]
        if stock:
            fastest = min(line["step_seconds"] for line in stock)
            lines[name]["ratio"] = fastest / lines[name]["step_seconds"]
            lines[name]["peak_ratio"] = lines[name]["peak_bytes"] / min(line["peak_bytes"] for line in stock)
    return {"variants": lines, "bars": judged(lines, BARS), "runs": dict(runs)}


def describe(summary: Mapping[str, Any]) -> str:
    return "\n".join([report.table(summary["variants"], COLUMNS), *verdicts(summary["bars"])])


def run_all(options: Mapping[str, str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run all variants, alternating, after an uncounted run that fills the caches."""
    model = folder / "model"
    model.mkdir()
    write_model(model, int(options["layers"]), int(options["blocks"]))
    pictures, text = write_rows(folder, int(options["rows"]), int(options["side"]), int(options["answer"]))
    common = {"model": model, "steps": options["steps"], "batch": options["batch"]}
    ours = {**common, "length": 4096, "micro": options["batch"], "train_on": "assistant"}
    plain = f"data.packing=false;data.truncation=error;{options['ours']}"
    turns: dict[str, tuple[str, dict[str, Any]]] = {
        "pictures": ("benchmarks.ours", {**ours, "rows": pictures, "set": plain}),
        "computed": ("benchmarks.ours", {**ours, "rows": pictures, "set": f"{plain};data.media_cache=false"}),
        "text": ("benchmarks.ours", {**ours, "rows": text, "set": plain}),
        "stock": ("benchmarks.media_stock", {**common, "rows": pictures}),
        "stock+checkpointing": ("benchmarks.media_stock", {**common, "rows": pictures, "checkpointing": "true"}),
    }
    cache = folder / "cache"
    measure("benchmarks.ours", {**ours, "rows": pictures, "set": plain, "steps": 1}, _LIMIT_SECONDS, cache)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for _ in range(int(options["repeats"])):
        for name, (module, words) in turns.items():
            runs[name].append(measure(module, words, _LIMIT_SECONDS, cache))
            report.log(report.table({name: figures_of(runs[name][-1])}, COLUMNS))
    return runs


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    machine = device()
    with tempfile.TemporaryDirectory() as name:
        runs = run_all(options, Path(name))
    summary = {**report.heading("media", options, machine), **summarize(runs)}
    report.conclude("media", options, machine, summary, describe(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
