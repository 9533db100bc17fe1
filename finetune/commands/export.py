"""usage: finetune export adapter=RUN_OR_ADAPTER format=FORMAT out=DIR [key=value …]
       finetune export model=MERGED_FOLDER    format=FORMAT out=DIR [key=value …]

Merges the adapter, writes the format, reads it back with the reader of that format, and compares greedy answers and
probabilities on fixed prompts. A folder that answers differently from its source is deleted.

Examples
  finetune export adapter=outputs/quickstart format=gguf type=q8_0 out=gguf
  finetune export adapter=outputs/lora format=gguf type=q4_k_m imatrix=rows.jsonl out=gguf
  finetune export adapter=outputs/lora format=adapter out=served
  finetune export model=merged format=onnx type=int4 out=onnx
"""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Export, then print the folder and the commands that serve it."""
    from finetune.export.exporter import check_export

    check_export(arguments.options)  # Takes a tenth of the time of importing torch.

    from finetune.export.export import export_model

    exported = export_model(arguments.options)
    print(arguments.options.out)
    for line in exported.serve:
        log(f"serve: {line}")
    return 0


def _formats() -> str:
    from finetune.export.exporter import formats_help

    return f"Formats and their number types, the default first\n{formats_help()}"


COMMAND = Command("export", __doc__, run, options="ExportOptions", details=_formats)
