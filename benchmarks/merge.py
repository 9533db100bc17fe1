"""Compare merging a sharded model of real widths: ours, PEFT's merge_and_unload, and a copy of the files, alternating.

    python -m benchmarks.merge [size=7B] [layers=4] [targets=q_proj,v_proj] [rank=16] [repeats=3] [limit=2GB] [work=DIR]

Every run is a fresh process. Dequantized merges quantize the base first, unless training left it in the cache. Time is
from imported libraries to a complete folder on the disk. Peak: the highest resident size above that of the interpreter
with its libraries. `bound` is the bound for ours: the largest adapted matrix in fp32, the adapter, and 300 MB. `limit`
is the memory of one more run of ours, above the same start.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.load import memory
from benchmarks.processes import device, measure, parse, work_folder

DEFAULTS = {
    "size": "7B",
    "layers": "4",
    "tokenizer": "data/tiny-qwen2.5",
    "targets": "q_proj,v_proj",
    "rank": "16",
    "repeats": "3",
    "limit": "2GB",
    "work": "",
    "run": "",
    "model": "",
    "adapter": "",
    "out": "",
    "results": "benchmarks/results",
}
_LIMIT_SECONDS = 1800.0
_ALLOWED_BYTES = 300e6


def write_adapter(model: Path, folder: Path, targets: list[str], rank: int) -> Path:
    """Write a PEFT adapter with random factors for the model's layers."""
    import torch
    from safetensors.torch import save_file

    from finetune.planning.static_memory import linear_shapes

    config = json.loads((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (out, inputs) in linear_shapes(config).items():
            if name in targets:
                room = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                module = f"base_model.model.model.layers.{layer}.{room}.{name}"
                tensors[f"{module}.lora_A.weight"] = 0.02 * torch.randn(rank, inputs, generator=generator)
                tensors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def ours(options: dict[str, str], base: str = "original") -> None:
    from finetune.config.command_options import MergeOptions
    from finetune.config.overrides import read_options
    from finetune.export.merge.merge import merge
    from finetune.system.console import progress_bar

    words = [f"adapter={options['adapter']}", f"out={options['out']}", f"base={base}", "kl_check.num_examples=0"]
    merge(read_options(MergeOptions, words, "benchmark"), lambda text: None, progress_bar)


def dequantized(options: dict[str, str]) -> None:
    ours(options, "dequantized")


def loaded(options: dict[str, str]) -> None:
    """Load the base in 4 bit as training does, which fills the cache."""
    from finetune.config.schema import ModelConfig, QuantConfig
    from finetune.models.load import load_base

    load_base(ModelConfig(name=options["model"]), QuantConfig(), "cpu")


def by_peft(options: dict[str, str]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, options["adapter"]).merge_and_unload()
    merged.save_pretrained(options["out"], max_shard_size="4GB")
    AutoTokenizer.from_pretrained(options["model"]).save_pretrained(options["out"])
    _to_disk(Path(options["out"]))


def copied(options: dict[str, str]) -> None:
    shutil.copytree(options["model"], options["out"])
    _to_disk(Path(options["out"]))


def _to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


RUNS = {
    "ours": ours,
    "ours, dequantized": dequantized,
    "ours, dequantized, where it was trained": dequantized,
    "peft": by_peft,
    "copy": copied,
    "load": loaded,
}


def one_run(options: dict[str, str]) -> dict[str, float]:
    """Merge in this process, and return time and memory."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import finetune.export.merge.merge  # noqa: F401

    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    if options["limit"]:
        from finetune.system.format import parse_size

        allowed = memory()["VmData"] + parse_size("limit", options["limit"])
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    os.sync()  # writes of the previous run do not count for this one
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = memory(), time.perf_counter()
    RUNS[options["run"]](options)
    return {"seconds": time.perf_counter() - start, "peak_bytes": memory()["VmHWM"] - before["VmRSS"]}


def run(options: dict[str, str], name: str, limit: str = "") -> dict[str, Any]:
    """Measure one merge in a fresh process, and remove its output."""
    shutil.rmtree(options["out"], ignore_errors=True)
    # After an earlier load, the 4-bit base is in the cache.
    cache = Path(options["work"]) / ("merge-cache" if "trained" in name or name == "load" else "no-cache")
    found = measure("benchmarks.merge", {**options, "run": name, "limit": limit}, _LIMIT_SECONDS, cache)
    shutil.rmtree(options["out"], ignore_errors=True)
    report.log(f"{name}{' in ' + limit if limit else ''}: {found}")
    return found


def bound_bytes(model: Path, adapter: Path, targets: list[str]) -> float:
    from finetune.planning.static_memory import linear_shapes

    shapes = linear_shapes(json.loads((model / "config.json").read_text()))
    largest = max(out * inputs * 4 for name, (out, inputs) in shapes.items() if name in targets)
    return largest + (adapter / "adapter_model.safetensors").stat().st_size + _ALLOWED_BYTES


def describe(summary: dict[str, Any]) -> str:
    """Format the table as Markdown."""
    lines = ["| | seconds | of a copy's time | peak | of PEFT's peak |", "|---|---|---|---|---|"]
    runs = summary["runs"]
    for name, found in runs.items():
        lines.append(
            f"| {name} | {found['seconds']:.2f} | {found['seconds'] / runs['copy']['seconds']:.2f} "
            f"| {found['peak_bytes'] / 1e6:,.0f} MB | {found['peak_bytes'] / runs['peft']['peak_bytes']:.3f} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    if options["run"]:
        print(json.dumps(one_run(options)))
        return
    from benchmarks.models import write_random_model

    work, machine = work_folder(options["work"]), device()
    layers = int(options["layers"])
    folder = work / f"qwen2.5-{options['size']}-{layers}-layers"
    model = write_random_model(options["size"], Path(options["tokenizer"]), folder, layers=layers)
    targets = options["targets"].split(",")
    adapter = write_adapter(model, work / "merge-adapter", targets, int(options["rank"]))
    own = {**options, "model": str(model), "adapter": str(adapter), "out": str(work / "merged"), "work": str(work)}
    run(own, "load")
    kinds = [name for name in RUNS if name != "load"]
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(int(options["repeats"])):
        for name in kinds:
            done[name].append(run(own, name))
    runs = {
        name: {key: median(one[key] for one in found) for key in ("seconds", "peak_bytes")}
        for name, found in done.items()
    }
    limited = {name: run(own, name, options["limit"]) for name in ("ours", "ours, dequantized", "peft")}
    summary = {
        **report.heading("merge", options, machine),
        "all": done,
        "runs": runs,
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "bound_bytes": bound_bytes(model, adapter, targets),
        "limited": limited,
    }
    report.log("\n" + describe(summary))
    report.write(report.results_file("merge", options, machine), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
