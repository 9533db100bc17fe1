"""`finetune <command> [config=X.yaml] [key=value …] [--flags]`: find the command, run it, return its exit code.

Data goes to stdout, messages to stderr. A command is imported when it runs: help needs no torch.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
import traceback
from collections.abc import Sequence

from finetune import __version__
from finetune.commands.base import COMMANDS, load_command
from finetune.system.arguments import nearest
from finetune.system.console import report_error
from finetune.system.errors import FinetuneError, InputError, is_disk_full
from finetune.system.libraries import configure_libraries
from finetune.system.out_of_memory import is_out_of_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see finetune.system.errors). Never raises."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _defer_garbage_collection()
    try:
        exit_code = _dispatch(words)
        sys.stdout.flush()  # Here, so that a closed pipe is handled below.
        return exit_code
    except FinetuneError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl+C", 130)
    except BrokenPipeError:
        # The reader of stdout has closed the pipe (`… | head`). Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last frame: every error becomes a message and an exit code
        if advice := _resource_advice(error):
            return _fail(f"{advice} ({error})", 4)
        traceback.print_exc()
        bug = f"this is a bug in finetune {__version__} ({type(error).__name__})"
        return _fail(f"{bug}; please report it with the lines above", 1)


@functools.cache
def _defer_garbage_collection() -> None:
    """Raise the threshold: scanning half a million objects of libraries takes 4 s of a start and an exit."""
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"finetune {__version__}")
        return 0
    name, *rest = words
    if " ".join(words[:2]) in COMMANDS:
        name, rest = " ".join(words[:2]), words[2:]
    if name not in COMMANDS:
        raise InputError(f"{name}: unknown command{nearest(name, COMMANDS)}\nhelp: commands: {', '.join(COMMANDS)}")
    configure_libraries()
    return load_command(name).execute(rest)


def _overview() -> str:
    commands = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    return f"""\
finetune {__version__}: fine-tune Qwen2.5 models in 4-bit

usage: finetune <command> [config=X.yaml] [key=value …] [--flags]

{commands}

Examples
  finetune doctor
  finetune data config=quickstart.yaml show=3
  finetune train config=quickstart.yaml
  finetune chat adapter=outputs/quickstart
  finetune serve adapter=outputs/quickstart
  finetune merge adapter=outputs/quickstart out=merged

`finetune <command> --help` explains a command."""


def _resource_advice(error: BaseException) -> str | None:
    """Return advice for an error of memory or disk, else None."""
    smaller = "lower train.micro_batch_size or data.max_length, or set train.gradient_checkpointing=all"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU ran out of memory; {smaller} (offload saves more)"
    if torch is not None and isinstance(error, torch.AcceleratorError) and "out of memory" in str(error):
        # torch's allocator raises the other error: this one is of main memory that CUDA pins, or of its context.
        return f"CUDA ran out of memory or of main memory to pin; {smaller} (offload pins main memory)"
    if is_out_of_memory(error):
        return f"memory ran out; {smaller}, or choose a smaller model"
    if is_disk_full(error):
        return "the disk is full; free space or set output_dir to another disk, then continue with train.resume=auto"
    return None


def _fail(message: str, exit_code: int) -> int:
    report_error(message)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
