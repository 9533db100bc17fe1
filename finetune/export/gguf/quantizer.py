"""llama.cpp's own quantizer, for the types that the gguf package cannot write. This module imports no torch.

The command `llama-quantize` on PATH is used, else the package llama-cpp-python in a process of its own: its C++ code
ends the process at an error. `main` takes the arguments of `llama-quantize`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.system.errors import FinetuneError, MissingExtra
from finetune.system.machine import usable_cores

# File types by llama.cpp's names, with True if they need an importance matrix.
QUANTIZER_TYPES: dict[str, bool] = dict.fromkeys(
    "q4_k_m q4_k_s q5_k_m q5_k_s q6_k q3_k_l q3_k_m q3_k_s q2_k iq4_nl iq4_xs iq3_m iq3_s".split(), False
)
QUANTIZER_TYPES |= dict.fromkeys("iq3_xs iq3_xxs iq2_m iq2_s iq2_xs iq2_xxs".split(), True)
_INSTALL = "put llama.cpp's `llama-quantize` on PATH, or run: pip install llama-cpp-python"
_SHOWN_LINES = 5


def llama_package() -> Any | None:
    """Import llama-cpp-python; return None if it is not installed or does not load."""
    try:
        return import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):
        return None


def find_quantizer(kind: str, imatrix: bool) -> list[str]:
    """Return the command of the quantizer, without its arguments.

    Raises:
        MissingExtra: neither the command nor the package is installed, or the package is too old for `imatrix`.
    """
    if (command := shutil.which("llama-quantize")) is not None:
        return [os.path.abspath(command)]
    if (package := llama_package()) is None:
        raise MissingExtra(f"type={kind}: llama.cpp's quantizer writes it, found none\nhelp: {_INSTALL}")
    if imatrix and not hasattr(package, "llama_model_imatrix_data"):
        raise MissingExtra(
            f"imatrix: llama-cpp-python is too old for it, found {package.__version__}\n"
            "help: pip install --upgrade llama-cpp-python"
        )
    paths = [os.path.abspath(path) for path in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {paths}; from {__name__} import main; sys.exit(main())"]


def quantize_file(source: Path, out: Path, kind: str, imatrix: Path | None) -> None:
    """Write a GGUF model in another file type. source, out and imatrix are in one folder.

    Raises:
        MissingExtra: as `find_quantizer`.
        FinetuneError: the quantizer failed; the message has the end of its output.
    """
    command = find_quantizer(kind, imatrix is not None)
    weighted = [] if imatrix is None else ["--imatrix", imatrix.name]
    words = [*command, *weighted, source.name, out.name, kind.upper(), str(usable_cores())]
    # The file records the name of the importance matrix, which holds no path of this machine.
    done = subprocess.run(
        words, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0 or not out.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()][-_SHOWN_LINES:]
        listed = "".join(f"\n  {line}" for line in lines)
        raise FinetuneError(f"type={kind}: {command[0]} failed, found exit code {done.returncode}{listed}")


def _quantize_with_package(source: str, out: str, kind: str, threads: int, imatrix: str | None) -> int:
    import gguf

    llama_cpp: Any = import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = gguf.LlamaFileType[f"MOSTLY_{kind}"].value
    settings.nthread = threads
    if imatrix is not None:
        matrices = read_imatrix(Path(imatrix))
        entry = llama_cpp.llama_model_imatrix_data
        entries = [
            entry(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in matrices.items()
        ]
        settings.imatrix = (entry * (len(entries) + 1))(*entries)  # An empty entry ends the list.
    return llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings))


def read_imatrix(path: Path) -> dict[str, Any]:
    """Return the mean squares fp32 [C] of the inputs of each tensor, from llama.cpp's GGUF format."""
    import gguf

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {name: (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"].item()).ravel() for name in names}


def main() -> int:
    """Quantize with the package and the arguments of this process; return 0, or another number after an error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--imatrix")
    for word in ("source", "out", "kind"):
        parser.add_argument(word)
    parser.add_argument("threads", type=int)
    return _quantize_with_package(**vars(parser.parse_args()))
