"""Measure a streamed teacher: its pass against reading alone and computing alone, and its memory.

    python -m benchmarks.streaming [model=FOLDER|size=0.5B] [tokens=256,1024,4096] [batch=1024] [repeats=3]

Every macro-batch size is a fresh process. Passes with the files out of the system's cache (cold) and in it (warm)
alternate with reading all layers without computing, and with the same batches through a resident model. `share` is the
longer of these two over the pass. Peak: the highest resident memory of a pass and the head, with mapped pages, above
that of a process that has streamed a tiny model. `bar` is two layers, head and states.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import forget, memory
from benchmarks.processes import device, measure, parse, work_folder

DEFAULTS = {
    "model": "",
    "size": "0.5B",
    "tokenizer": "data/tiny-qwen2.5",
    "tokens": "256,1024,4096",
    "batch": "1024",
    "document": "256",
    "repeats": "3",
    "work": "",
    "results": "",
    "run": "",
}
_LIMIT_SECONDS = 3600.0
_WORDS = 1024  # present in every model, also in the tiny one


def macro_batch(tokens: int, batch: int, document: int) -> list[Any]:
    """Build batches of random documents with targets in their second half."""
    import numpy as np

    from finetune.data.batch import build_batch
    from finetune.data.documents import Document
    from finetune.data.encoded import IGNORE_INDEX

    random = np.random.default_rng(0)

    def row(length: int) -> Document:
        ids = random.integers(_WORDS, size=length, dtype=np.int32)
        return Document(ids, np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids).astype(np.int32), "random")

    sizes = [min(batch, tokens - start) for start in range(0, tokens, batch)]
    return [build_batch([row(min(document, size - at)) for at in range(0, size, document)]) for size in sizes]


def layers_of(folder: Path) -> list[dict[str, Any]]:
    """Return the locations of each decoder layer's tensors, by their names within the layer."""
    from finetune.models.hub import weight_files
    from finetune.models.safetensors_index import WeightFiles

    layers: dict[int, dict[str, Any]] = {}
    for name, stored in WeightFiles(weight_files(folder, str(folder))).tensors.items():
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            layers.setdefault(int(number), {})[rest] = stored
    return [layers[number] for number in range(len(layers))]


def read_alone(layers: list[dict[str, Any]], buffers: list[Any]) -> None:
    """Read every layer as a pass does, without computing."""
    from finetune.distill.layer_reader import Reads

    with Reads() as reads:
        for i, layer in enumerate(layers[:2]):
            buffers[i].begin(layer, reads)
        for i in range(len(layers)):
            buffers[i % 2].take()
            buffers[i % 2].release()
            if i + 2 < len(layers):
                buffers[i % 2].begin(layers[i + 2], reads)


def resident(folder: str, batches: list[Any], place: Any) -> Callable[[], None]:
    """Return a function that computes the same states with the whole model in memory, after one warm-up."""
    import torch

    from finetune.config.schema import ModelConfig, QuantConfig
    from finetune.losses.hidden_states import target_states
    from finetune.models.fused import fuse_layers
    from finetune.models.load import load_base

    model = load_base(ModelConfig(name=folder), QuantConfig(type="none", double=False), place)
    fuse_layers(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the system cannot drop pages of a mapped file

    @torch.no_grad()
    def compute() -> None:
        for batch in batches:
            target_states(model, batch)

    compute()
    return compute


def answer(model: Any, batches: list[Any]) -> None:
    """Run a pass, and compute the logits of one target, which reads the whole head."""
    import torch

    with torch.no_grad():
        model.head(model.hidden_states(batches)[0][:1])


def timed(function: Callable[[], Any], place: Any) -> float:
    import torch

    start = time.perf_counter()
    function()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_size(options: dict[str, str]) -> dict[str, Any]:
    """Measure a macro-batch in this process: memory of a pass, then its time and its bounds, alternating."""
    import torch

    from finetune.config.schema import ModelConfig
    from finetune.distill.layer_reader import layer_buffers
    from finetune.distill.stream import StreamedModel

    place = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder, sizes = Path(options["model"]), (int(options[key]) for key in ("run", "batch", "document"))
    shape = json.loads((folder / "config.json").read_text())
    batches = macro_batch(*sizes)
    answer(StreamedModel(ModelConfig(name=options["tiny"]), place), batches)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory()["VmRSS"]
    model = StreamedModel(ModelConfig(name=options["model"]), place)
    for _ in range(2):  # the second with a used head
        answer(model, batches)
    peak_bytes = memory()["VmHWM"] - before
    head_bytes = sum(parameter.nbytes for parameter in model.head.parameters())
    gpu_peak_bytes = torch.cuda.max_memory_allocated() if place.type == "cuda" else None
    layers = layers_of(folder)
    buffers = layer_buffers({name: torch.Size(stored.shape) for name, stored in layers[0].items()}, model.dtype, place)
    compute = resident(options["model"], batches, place)
    turns: list[dict[str, Any]] = []
    for disk in ("cold", "warm") * int(options["repeats"]):
        seconds: dict[str, float] = {}
        read_alone(layers, buffers)  # fills the system's cache
        for kind, function in (
            ("wall", lambda: model.hidden_states(batches)),
            ("read", lambda: read_alone(layers, buffers)),
            ("compute", compute),
        ):
            if disk == "cold":
                forget(folder)
            seconds[f"{kind}_seconds"] = timed(function, place)
        turns.append({"disk": disk, **seconds})
    return {
        "tokens": sum(batch.tokens for batch in batches),
        "turns": turns,
        "peak_bytes": peak_bytes,
        "gpu_peak_bytes": gpu_peak_bytes,
        "layer_bytes": sum(stored_bytes(stored) for stored in layers[0].values()),
        "layers_bytes": sum(stored_bytes(stored) for layer in layers for stored in layer.values()),
        "head_bytes": head_bytes,
        "states_bytes": sum(batch.rows for batch in batches) * shape["hidden_size"] * model.dtype.itemsize,
    }


def stored_bytes(stored: Any) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def summary_of(size: dict[str, Any]) -> dict[str, Any]:
    """Return medians by state of the disk cache, and the bound for the peak."""
    disks: dict[str, Any] = {}
    for disk in ("cold", "warm"):
        turns = [turn for turn in size["turns"] if turn["disk"] == disk]
        figures = {key: median(turn[key] for turn in turns) for key in turns[0] if key != "disk"}
        bound = max(figures["read_seconds"], figures["compute_seconds"])
        disks[disk] = {
            **figures,
            "share": bound / figures["wall_seconds"],
            "read_bytes_per_second": size["layers_bytes"] / figures["read_seconds"],
            "tokens_per_second": size["tokens"] / figures["wall_seconds"],
        }
    bar = 2 * size["layer_bytes"] + size["head_bytes"] + size["states_bytes"]
    return {**size, "disks": disks, "bar_bytes": bar, "peak_over_bar_bytes": size["peak_bytes"] - bar}


def main(words: list[str]) -> None:
    options = parse(words, {**DEFAULTS, "tiny": ""})
    if options["run"]:
        print(json.dumps(one_size(options)))
        return
    from benchmarks.models import write_random_model

    work, tokenizer = work_folder(options["work"]), Path(options["tokenizer"])
    options["tiny"] = str(write_random_model("tiny", tokenizer, work / "qwen2.5-tiny"))
    if not options["model"]:
        options["model"] = str(write_random_model(options["size"], tokenizer, work / f"qwen2.5-{options['size']}"))
    print(
        f"{'tokens':>8} {'disk':<5}{'pass':>9}{'reading':>10}{'computing':>11}{'share':>8}{'peak':>10}{'bar':>10}",
        file=sys.stderr,
    )
    sizes = []
    for tokens in options["tokens"].split(","):
        found = measure("benchmarks.streaming", {**options, "run": tokens}, _LIMIT_SECONDS)
        if "failed" in found:
            raise SystemExit(f"{tokens} tokens: {found['failed']}")
        sizes.append(summary_of(found))
        for disk, figures in sizes[-1]["disks"].items():
            print(
                f"{tokens:>8} {disk:<5}{figures['wall_seconds']:>7.2f} s{figures['read_seconds']:>8.2f} s"
                f"{figures['compute_seconds']:>9.2f} s{figures['share']:>8.0%}{found['peak_bytes'] / 1e6:>7,.0f} MB"
                f"{sizes[-1]['bar_bytes'] / 1e6:>7,.0f} MB",
                file=sys.stderr,
            )
    here = device()
    result = {
        "benchmark": "streaming",
        "date": date.today().isoformat(),
        "device": here,
        **{key: options[key] for key in ("size", "batch", "document", "repeats")},
        "sizes": sizes,
    }
    kind = here["kind"] if here["kind"] == "cpu" else here["name"].replace(" ", "-").lower()
    results = Path(options["results"] or Path(__file__).parent / "results")
    results.mkdir(exist_ok=True)
    file = results / f"streaming-{kind}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
