from __future__ import annotations


def adapter_to_gguf(job): ...
