"""The base model, its quantization and its adapter, as ordinary transformers, bitsandbytes and PEFT objects."""

from __future__ import annotations

import logging

# bitsandbytes says at import that it could not fetch an optional CPU kernel from the hub, and at every int8 product
# that it rounds the input to fp16: neither is news to the user, and both must be silenced before its first import.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
