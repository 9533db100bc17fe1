"""Stand in for llama.cpp's `llama-quantize` in tests: takes its arguments, and rounds every matrix to q5_0.

MODE in the environment: `fail` writes half a file and exits with 3; `swap` exchanges two tensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np

SCRIPT = f"#!/bin/sh\nexec '{sys.executable}' '{__file__}' \"$@\"\n"


def quantize(source: str, out: str, kind: str) -> None:
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "qwen2")
    writer.kv_data[0].clear()
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        value = gguf.LlamaFileType[f"MOSTLY_{kind}"].value if field.name == "general.file_type" else field.contents()
        items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=items)
    data = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    if os.environ.get("MODE") == "swap":
        one, two = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
        data[one], data[two] = data[two], data[one]
    q5_0 = gguf.GGMLQuantizationType.Q5_0
    for name, values in data.items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, q5_0), raw_dtype=q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    *_, source, out, kind, _ = sys.argv[1:]
    if os.environ.get("MODE") == "fail":
        Path(out).write_bytes(b"GGUF")
        print("not enough memory", file=sys.stderr)
        sys.exit(3)
    quantize(source, out, kind)
