"""Measure the quantization loss of the embedded base, and how much of it `recover` recovers, with real training.

    python -m benchmarks.recovery [steps=400] [rows=14000] [held_out=400] [seeds=0,1,2] [head=4] [samples=4]
                                  [only=NAME;NAME] [learning_rate=2e-3] [rank=8] [batch_size=16]

Text comes from the generator of the base's pretraining data (data/generate.py), with other seeds for training and
held-out rows. Every variant trains the same NF4 base on the same rows. All are measured on the same held-out targets
against the same bf16 teacher in memory. A seed is that of training and of the samples in a cache.

A sampled cache keeps `head` tokens per target, and draws `samples` of the others. `top-k` caches the same number of
tokens: only the most probable ones, rescaled to a sum of 1. Both numbers are small, because the base has 883 tokens and
is certain of most: with the default of 48, both would lose nothing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

from benchmarks import report
from benchmarks.processes import ROOT, device, parse

DEFAULTS = {
    "steps": "400",
    "rows": "14000",
    "held_out": "400",
    "seeds": "0,1,2",
    "head": "4",
    "samples": "4",
    "only": "",
    "learning_rate": "2e-3",
    "rank": "8",
    "batch_size": "16",
    "results": "benchmarks/results",
}
_TEXT_SEED = 20_26
# More parameters need smaller steps: 67 % recovered at 4e-4, 85 % at 1.5e-4 (benchmarks/NOTES.md).
_ALL = ("lora.target_modules=all-linear", "lora.rank=64", "lora.alpha=128", "train.learning_rate=1.5e-4")
# Adapters, and the source of the teacher outputs.
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "q,v, resident": ((), "resident"),
    "q,v, sampled": ((), "sampled"),
    "q,v, top-k rescaled": ((), "top-k"),
    "all linears, resident": (_ALL, "resident"),
    "all linears from loftq, resident": ((*_ALL, "lora.init=loftq"), "resident"),
    "all linears, sampled": (_ALL, "sampled"),
    "all linears, top-k rescaled": (_ALL, "top-k"),
}
_NOTHING_LEFT = 2**16 - 1  # code of the smallest mass in a cache: only the head counts


def write_text(folder: Path, rows: int, held_out: int) -> None:
    """Write train.jsonl and heldout.jsonl like the base's pretraining data, without common conversations."""
    generate = _generator()
    rng = Random(_TEXT_SEED)
    drawn: dict[str, None] = {}
    while len(drawn) < rows + held_out:
        drawn[json.dumps({"messages": generate.conversation(rng)})] = None
    lines = list(drawn)
    for name, part in (("train", lines[:rows]), ("heldout", lines[rows:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "data" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # its dataclasses look up their module
    spec.loader.exec_module(module)
    return module


class Experiment:
    """One base, one text, one teacher; each variant is trained into its own folder."""

    def __init__(self, options: dict[str, str], folder: Path):
        self.options, self.folder = options, folder
        write_text(folder, int(options["rows"]), int(options["held_out"]))

    def config(self, name: str, seed: int, *changes: str) -> Any:
        from finetune import load_config

        options = self.options
        return load_config(
            "quickstart.yaml",
            [
                "distill.objective=recover",
                f"data.train=[{{path: {self.folder}/train.jsonl}}]",
                f"data.eval=[{{path: {self.folder}/heldout.jsonl}}]",
                "data.max_length=512",
                "generation.num_examples=0",
                f"train.max_steps={options['steps']}",
                f"train.learning_rate={options['learning_rate']}",
                f"lora.rank={options['rank']}",
                f"lora.alpha={2 * int(options['rank'])}",
                f"train.seed={seed}",
                f"train.batch_size={options['batch_size']}",
                f"output_dir={self.folder}/{name}-{seed}",
                *changes,
            ],
        )

    def run(self, name: str, seed: int) -> dict[str, float]:
        """Train a variant with a seed, and return its KL from the teacher and its loss."""
        from finetune import train

        adapters, source = VARIANTS[name]
        changes = [*adapters]
        if source != "resident":
            changes += ["distill.teacher.placement=cached", "distill.spot_check=0", *self._cache(source, seed)]
        cfg = self.config(name.replace(" ", "-").replace(",", ""), seed, *changes)
        train(cfg)
        return self.measure(Path(cfg.output_dir))

    def _cache(self, source: str, seed: int) -> list[str]:
        """Return the settings of a cache of that kind, and write it if it is missing."""
        from finetune.commands.cache import run as run_cache
        from finetune.system.arguments import Arguments

        head, samples = int(self.options["head"]), int(self.options["samples"])
        if source == "top-k":
            head, samples, seed = head + samples, 1, 0
        folder = self.folder / f"cache-{source}-{seed}"
        settings = [
            f"distill.cache={folder}",
            f"distill.top_k={head}",
            f"distill.num_samples={samples}",
            f"distill.seed={seed}",
        ]
        if not folder.exists():
            (self.folder / "cache.yaml").write_text(_yaml(self.config("cache", 0)))
            run_cache(Arguments(str(self.folder / "cache.yaml"), tuple(settings), frozenset()))
            if source == "top-k":
                forget_the_tail(folder)
        return settings

    def measure(self, adapter: Path | None) -> dict[str, float]:
        """Return KL from the bf16 base, share of equal first choices, and loss over the held-out targets."""
        import torch

        from finetune.data.loader import load_chat_template, load_data
        from finetune.data.tokens.prepare import Preparation
        from finetune.distill.resident import load_resident
        from finetune.distill.teacher import teacher_model
        from finetune.evaluation.scoring import agreement, evaluate
        from finetune.models.adapters.files import load_adapter
        from finetune.models.load import load_base
        from finetune.models.tokenizer import load_tokenizer

        cfg = self.config("measure", 0)
        tokenizer = load_tokenizer(cfg.model)
        documents = load_data(Preparation(cfg.data, load_chat_template(cfg.data, tokenizer))).eval[0].documents
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = load_base(cfg.model, cfg.quant, place)
        teacher = load_resident(teacher_model(cfg), None, place, base)
        model = base if adapter is None else load_adapter(base, adapter)
        found = agreement(model, teacher, documents, len(tokenizer), limit_tokens=4096)
        return {"kl": found.kl, "top1": found.top1, "loss": evaluate(model, documents, limit_tokens=4096).loss}


def _yaml(cfg: Any) -> str:
    from finetune.config.compose import to_yaml

    return to_yaml(cfg)


def forget_the_tail(folder: Path) -> None:
    """Turn a sampled cache into a top-k cache: drop the mass of the tail, and rescale the head."""
    from safetensors.numpy import load_file, save_file

    from finetune.system.manifest import sha256_of

    records = {}
    for shard in sorted(folder.glob("shard-*.safetensors")):
        columns = load_file(shard)
        columns["tail"] = columns["tail"] * 0 + _NOTHING_LEFT
        save_file(columns, shard)
        records[shard.name] = {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
        shard.with_suffix(".json").write_text(json.dumps(records[shard.name]))
    complete = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({**complete, "shards": records}))


def chosen(options: dict[str, str]) -> Iterator[str]:
    """Return the variants to run."""
    wanted = [name.strip() for name in options["only"].split(";") if name.strip()]
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise SystemExit(f"only={';'.join(unknown)}: unknown; choose from {'; '.join(VARIANTS)}")
    return iter(wanted or VARIANTS)


def describe(before: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> str:
    """Format the table as Markdown; ± is the standard deviation over the seeds."""
    lines = [
        "| | nats a target from bf16 | regained | same first choice | loss on the rows |",
        "|---|---|---|---|---|",
        f"| NF4 | {before['kl']:.5f} | | {before['top1']:.2%} | {before['loss']:.4f} |",
    ]
    for name, done in runs.items():
        kl, regained = [run["kl"] for run in done], [100 - 100 * run["kl"] / before["kl"] for run in done]
        top1, loss = (mean(run[figure] for run in done) for figure in ("top1", "loss"))
        lines.append(f"| {name} | {_spread(kl, '.5f')} | {_spread(regained, '.1f')} % | {top1:.2%} | {loss:.4f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    machine = device()
    with tempfile.TemporaryDirectory() as name:
        experiment = Experiment(options, Path(name))
        before = experiment.measure(None)
        runs: dict[str, list[dict[str, float]]] = {}
        for variant in chosen(options):
            runs[variant] = [experiment.run(variant, int(seed)) for seed in options["seeds"].split(",")]
            report.log("\n" + describe(before, runs))
    summary = {
        **report.heading("recovery", options, machine),
        "before": before,
        "runs": runs,
        "table": describe(before, runs),
    }
    report.write(report.results_file("recovery", options, machine), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
