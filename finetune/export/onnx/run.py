"""Answer a prompt with the model of this folder: `python run.py "Hello"`. Needs onnxruntime-genai.

An export in ONNX has a copy of this file beside its model.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(prompt: str) -> None:
    """Print the answer token by token."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    og: Any = importlib.import_module("onnxruntime_genai")
    folder = Path(__file__).parent
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "chat_template" in settings or (folder / "chat_template.jinja").is_file():
        messages = json.dumps([{"role": "user", "content": prompt}])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    parameters = og.GeneratorParams(model)
    context = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    parameters.set_search_options(max_length=min(len(ids) + 512, context))
    generator, stream = og.Generator(model, parameters), tokenizer.create_stream()
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Hello")
