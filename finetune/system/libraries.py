"""Settings of libraries, made before their first import."""

from __future__ import annotations

import logging
import os


def configure_libraries() -> None:
    """Set how OpenMP threads wait and CUDA memory grows, and silence two warnings; call it before torch is imported."""
    # GNU OpenMP threads that finish early wait without sleeping, 6 ms by default. Beside another program on the same
    # cores that doubles or triples the time of a run; 0.2 ms costs a run that is alone nothing (benchmarks/NOTES.md).
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
    # Steps differ in tokens, and a block that CUDA's allocator freed serves only smaller ones. Expandable segments grow
    # in place. Since torch 2.9 the first name is read; the others are older.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # An optional CPU kernel is missing (at import); an int8 product rounds its input to fp16 (at every product).
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
