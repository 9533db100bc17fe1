"""Measure the frozen base that a rank holds: whole on one rank, and its part of it on several.

    python -m benchmarks.sharding [model=FOLDER|size=0.5B] [type=nf4] [ranks=2] [work=FOLDER]

`weight_bytes`: tensors of the base on the rank, without the adapter. `resident_bytes`: growth of the process by loading
the base and one forward pass of one token, mapped files too. Each number is that of the largest rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.load import memory
from benchmarks.processes import device, parse, work_folder
from benchmarks.report import heading, log, results_file, table

DEFAULTS = {
    "model": "",
    "size": "0.5B",
    "tokenizer": "data/tiny-qwen2.5",
    "type": "nf4",
    "ranks": "2",
    "work": "",
    "results": "benchmarks/results",
}
_COLUMNS = (("weights GB", "weight_bytes", 1e-9, ".3f"), ("resident GB", "resident_bytes", 1e-9, ".3f"))


def weight_bytes(base: Any) -> int:
    """Return the bytes of the frozen tensors that this rank holds, each once; quantized ones with their scales."""
    from torch.distributed.tensor import DTensor

    from finetune.models.quant.quantize import quantized_layers

    tensors = [tensor for tensor in base.parameters() if not tensor.requires_grad]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    states = [layer.quant_state for _, layer in quantized_layers(base, "nf4")]
    scales = [part for state in states for part in (state.absmax, getattr(state.state2, "absmax", None))]
    every = {tensor.data_ptr(): tensor.nbytes for tensor in (*local, *(s for s in scales if s is not None))}
    return sum(every.values())


def one_rank(rank: int, ranks: int, store: str, model: str, kind: Any) -> None:
    """Load the base in this process, and add its figures to those of the other ranks; rank 0 writes the largest."""
    import torch
    import torch.distributed as dist

    from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
    from finetune.models.adapters.attach import attach_lora
    from finetune.models.fused import fuse_layers
    from finetune.models.load import load_base
    from finetune.parallel.sharding import shard_base, shard_mesh
    from finetune.system.machine import malloc_trim

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    before = memory()["VmRSS"]
    quant = QuantConfig(type=kind, double=kind == "nf4")
    base = load_base(ModelConfig(name=model), quant, cpu, mapped=ranks > 1)
    peft = attach_lora(base, LoraConfig())
    fuse_layers(peft)
    if ranks > 1:
        shard_base(base, shard_mesh(cpu, ranks), cpu)
    with torch.no_grad():
        peft.eval()(torch.zeros(1, 1, dtype=torch.int64))
    for part in base.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    malloc_trim()  # as training does after each pass
    figures = torch.tensor([weight_bytes(base), memory()["VmRSS"] - before], dtype=torch.int64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if rank == 0:
        Path(f"{store}.figures").write_text(" ".join(map(str, figures.tolist())))
    dist.destroy_process_group()


def measure_ranks(ranks: int, folder: Path, model: str, kind: str) -> dict[str, int]:
    """Return the figures of the largest of some ranks."""
    import torch

    store = folder / f"store-{os.getpid()}-{ranks}"
    torch.multiprocessing.spawn(one_rank, (ranks, str(store), model, kind), nprocs=ranks)
    result = Path(f"{store}.figures")
    weights, resident = map(int, result.read_text().split())
    result.unlink()
    store.unlink(missing_ok=True)
    return {"weight_bytes": weights, "resident_bytes": resident}


def main() -> None:
    import json

    from benchmarks.models import write_random_model

    options = parse(sys.argv[1:], DEFAULTS)
    work = work_folder(options["work"])
    model = options["model"] or str(
        write_random_model(options["size"], Path(options["tokenizer"]), work / options["size"])
    )
    many = int(options["ranks"])
    measure_ranks(1, work, model, options["type"])  # fills the cache of quantized weights
    lines = {f"{ranks} ranks": measure_ranks(ranks, work, model, options["type"]) for ranks in (1, many)}
    log(table(lines, _COLUMNS))
    one, shared = lines["1 ranks"], lines[f"{many} ranks"]
    machine = device()
    result = heading("sharding", options, machine) | {
        "runs": lines,
        "ratios": {key: round(shared[key] / one[key], 3) for key in one},
    }
    results_file("sharding", options, machine).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
