"""A stub that lets a CPU build of torch run its autograd engine over fake tensors on cuda:0. Load it before torch.

It registers a CUDA device guard and hooks which do nothing. g++ builds it once, in about 5 seconds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("stub.cpp")


def has_compiler() -> bool:
    return shutil.which("g++") is not None


def load_stub() -> None:
    """Build the stub for the installed torch, and load it with torch's libraries."""
    assert "torch" not in sys.modules, "the stub comes before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())
    assert found is not None
    library = Path(os.environ.get("FINETUNE_STUB_DIR", tempfile.gettempdir())) / f"cuda_stub_{found[1]}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        options = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", "-o", str(part), str(_SOURCE)]
        libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(["g++", *options, *libraries], check=True)
        part.replace(library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
