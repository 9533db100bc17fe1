"""`finetune export`: an adapter or a merged model in the format of another program, read back before it is kept."""

from __future__ import annotations

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune export adapter=RUN_OR_ADAPTER format=FORMAT out=DIR [key=value …]
       finetune export model=MERGED_FOLDER    format=FORMAT out=DIR [key=value …]

Merges the adapter, writes the format, reads it back with that format's own reader, and compares: greedy answers to
fixed prompts and the distance of the probabilities. A folder that does not answer as its source does is not kept.

Formats, and what type= may be (the first is the default)
  safetensors   a transformers folder: bf16 fp16 fp32, or for servers nf4 int8 fp8
  adapter       the adapter itself, for servers that load adapters beside a base
  gguf          for llama.cpp: q8_0 f32 f16 bf16 q5_1 q5_0 q4_1 q4_0 mxfp4 tq2_0 tq1_0; with merge=false
                the adapter as a GGUF LoRA: f32 f16 bf16 q8_0
  ollama        GGUF, types as there, with a Modelfile
  onnx          for onnxruntime-genai, with its key-value cache: fp32 fp16 int8 int4 int8-dynamic

Examples
  finetune export adapter=outputs/quickstart format=gguf type=q8_0 out=gguf
  finetune export adapter=outputs/lora format=adapter out=served
  finetune export model=merged format=onnx type=int4 out=onnx
"""


def export_help() -> str:
    """The usage and every setting."""
    from finetune.config.command_options import ExportOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(ExportOptions)}"


def run_export(arguments: Arguments) -> int:
    """`finetune export`. Raises: InputError for what cannot be meant; what reading and writing raise."""
    from finetune.config.command_options import ExportOptions
    from finetune.config.options import read_options

    if arguments.config is not None:
        raise InputError("finetune export takes no config; name what to export: adapter=outputs/NAME or model=FOLDER")
    options = read_options(ExportOptions, arguments.overrides, "finetune export")

    from finetune.export.export import export_model
    from finetune.system.console import log

    exported = export_model(options)
    print(options.out)
    for line in exported.serve:
        log(f"serve: {line}")
    return 0
