"""Rules on how ranks share the frozen base."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.sections import ModelConfig, ParallelConfig, QuantConfig


def shared_base(model: ModelConfig, quant: QuantConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Yield what a sharded base cannot do."""
    if parallel.offload and parallel.shard not in ("full", "hybrid"):
        yield Problem("parallel.offload", f"needs parallel.shard=full or hybrid, found {parallel.shard}")
    if parallel.shard not in ("full", "hybrid"):
        return
    sharded = f"with parallel.shard={parallel.shard}"
    if quant.type == "int8" or quant.int8:
        key = "type" if quant.type == "int8" else "int8"
        yield Problem(f"quant.{key}", f"8-bit layers cannot be sharded; use nf4 {sharded}")
    if quant.type == "nf4" and not quant.cache:
        yield Problem("quant.cache", f"each rank reads its part from the cache; set quant.cache=true {sharded}")
    if quant.keep_dequantized:
        yield Problem("quant.keep_dequantized", f"keeps whole weights; set quant.keep_dequantized=false {sharded}")
    if model.embedding == "host":
        yield Problem("model.embedding", f"host: the embedding is sharded too {sharded}; set model.embedding=auto")
