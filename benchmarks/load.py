"""Compare loading a 4-bit base: first start, later starts, and transformers' from_pretrained, alternating.

    python -m benchmarks.load model=FOLDER|size=0.5B [type=nf4] [double=true] [repeats=3] [disk=warm|cold] [work=FOLDER]

Every load is a fresh process. `first` quantizes and fills an empty cache; `next` reads it. Time is from imported
libraries to a model that can run, and separately the first forward pass of 16 tokens, which touches the mapped files.
Peak: the highest resident size above that of the interpreter with its libraries, with mapped files (on a GPU also the
allocated bytes). disk=cold drops the files from the system's cache before each load.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import device, measure, parse, work_folder

DEFAULTS = {
    "model": "",
    "size": "0.5B",
    "tokenizer": "data/tiny-qwen2.5",
    "type": "nf4",
    "double": "true",
    "repeats": "3",
    "disk": "warm",
    "work": "",
    "run": "",
}
_LIMIT_SECONDS = 3600.0


def by_us(folder: str, quant_type: Any, double: bool, place: Any) -> Any:
    from finetune.config.schema import ModelConfig, QuantConfig
    from finetune.models.load import load_base

    return load_base(ModelConfig(name=folder), QuantConfig(type=quant_type, double=double), place)


def by_transformers(folder: str, quant_type: Any, double: bool, place: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": place}
    )


RUNS = {"first": by_us, "next": by_us, "transformers": by_transformers}


def one_load(options: dict[str, str]) -> dict[str, Any]:
    """Load in this process, and return time and memory."""
    import bitsandbytes  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import finetune.models.load  # noqa: F401

    place = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.zeros(1, device=place)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory()
    start = time.perf_counter()
    load = RUNS[options["run"]]
    model = load(options["model"], options["type"], options["double"] == "true", place)
    if place.type == "cuda":
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    after = memory()
    with torch.no_grad():
        model.train()(torch.arange(16, device=place)[None] + 100).logits.sum().item()
    return {
        "seconds": loaded - start,
        "forward_seconds": time.perf_counter() - loaded,
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_bytes": after["RssAnon"] - before["RssAnon"],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if place.type == "cuda" else None,
    }


def memory() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


def forget(*folders: Path) -> None:
    """Drop the files' pages from the system's cache, so that they are read from the disk again."""
    for file in (path for folder in folders for path in folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def all_loads(options: dict[str, str], cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Measure each kind `repeats` times, alternating."""
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for _ in range(int(options["repeats"])):
        for name in RUNS:
            if name == "first":
                # Also removes the digest of the weights: a first start has none.
                shutil.rmtree(cache, ignore_errors=True)
            if options["disk"] == "cold":
                forget(Path(options["model"]), cache)
            found = measure("benchmarks.load", {**options, "run": name}, _LIMIT_SECONDS, cache)
            if "failed" in found:
                raise SystemExit(f"{name}: {found['failed']}")
            done[name].append(found)
            print(
                f"{name:<14}{found['seconds']:>8.2f} s{found['forward_seconds']:>8.2f} s forward"
                f"{found['peak_bytes'] / 1e6:>8,.0f} MB peak",
                file=sys.stderr,
            )
    return done


def summary_of(done: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of each kind, and their ratios."""
    keys = ("seconds", "forward_seconds", "peak_bytes", "anonymous_bytes", "gpu_peak_bytes")
    loads = {
        name: {key: median(run[key] for run in runs) if runs[0][key] is not None else None for key in keys}
        for name, runs in done.items()
    }
    first, following, peer = loads["first"], loads["next"], loads["transformers"]
    ratios = {
        "first_to_next": first["seconds"] / following["seconds"],
        "transformers_to_next": peer["seconds"] / following["seconds"],
        "transformers_to_first": peer["seconds"] / first["seconds"],
        "with_forward_transformers_to_next": (peer["seconds"] + peer["forward_seconds"])
        / (following["seconds"] + following["forward_seconds"]),
        "peak_first_to_transformers": first["peak_bytes"] / peer["peak_bytes"],
        "peak_next_to_transformers": following["peak_bytes"] / peer["peak_bytes"],
    }
    return {"loads": loads, "ratios": ratios}


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    if options["run"]:
        print(json.dumps(one_load(options)))
        return
    work = work_folder(options["work"])
    if not options["model"]:
        from benchmarks.models import write_random_model

        folder = work / f"qwen2.5-{options['size']}"
        options["model"] = str(write_random_model(options["size"], Path(options["tokenizer"]), folder))
    weights_bytes = sum(file.stat().st_size for file in Path(options["model"]).glob("*.safetensors"))
    cache = work / "load-cache"
    here = device()
    result = {
        "benchmark": "load",
        "date": date.today().isoformat(),
        "device": here,
        "weights_bytes": weights_bytes,
        **{key: options[key] for key in ("type", "double", "repeats", "disk")},
        **summary_of(all_loads(options, cache)),
    }
    result["cache_bytes"] = sum(file.stat().st_size for file in cache.rglob("*.safetensors"))
    shutil.rmtree(cache, ignore_errors=True)
    print(f"\n{'':<14}{'load':>10}{'+ forward':>12}{'peak':>12}{'of it anonymous':>18}")
    for name, load in result["loads"].items():
        print(
            f"{name:<14}{load['seconds']:>8.2f} s{load['seconds'] + load['forward_seconds']:>10.2f} s"
            f"{load['peak_bytes'] / 1e6:>9,.0f} MB{load['anonymous_bytes'] / 1e6:>15,.0f} MB"
        )
    kind = here["kind"] if here["kind"] == "cpu" else here["name"].replace(" ", "-").lower()
    file = Path(__file__).parent / "results" / f"load-{kind}-{result['date']}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
