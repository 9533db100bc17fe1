"""`finetune export`: write an adapter or a model in the format of another program."""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log

USAGE = """\
usage: finetune export adapter=RUN_OR_ADAPTER format=FORMAT out=DIR [key=value …]
       finetune export model=MERGED_FOLDER    format=FORMAT out=DIR [key=value …]

Merges the adapter, writes the format, reads it back with the reader of that format, and compares greedy answers and
probabilities on fixed prompts. A folder that answers differently from its source is deleted.

Formats and their values of type= (the first is the default)
  safetensors   a transformers folder: bf16 fp16 fp32; for servers also nf4 int8 fp8
  adapter       the adapter alone, for servers that load adapters beside a base
  gguf          for llama.cpp: q8_0 f32 f16 bf16 q5_1 q5_0 q4_1 q4_0 mxfp4 tq2_0 tq1_0; with merge=false
                the adapter as a GGUF LoRA: f32 f16 bf16 q8_0
  ollama        GGUF with the same types, and a Modelfile
  onnx          for onnxruntime-genai, with its key-value cache: fp32 fp16 int8 int4 int8-dynamic

Examples
  finetune export adapter=outputs/quickstart format=gguf type=q8_0 out=gguf
  finetune export adapter=outputs/lora format=adapter out=served
  finetune export model=merged format=onnx type=int4 out=onnx
"""


def run(arguments: Arguments) -> int:
    """Export, then print the folder and the commands that serve it."""
    from finetune.export.export import export_model

    exported = export_model(arguments.options)
    print(arguments.options.out)
    for line in exported.serve:
        log(f"serve: {line}")
    return 0


COMMAND = Command(
    "export", "write a model for llama.cpp, Ollama, ONNX Runtime or a server", USAGE, run, options="ExportOptions"
)
