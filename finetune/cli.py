"""`finetune <command> [config=X.yaml] [key=value …] [--flags]`: finds the command, runs it, ends with the exit code.

Data goes to stdout, messages to stderr. Commands are imported when they run: help needs no torch.
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune import __version__
from finetune.system.arguments import Arguments, nearest, parse_arguments
from finetune.system.console import printable
from finetune.system.errors import FinetuneError, InputError


@dataclass(frozen=True, slots=True)
class Command:
    """run: address of a function, Arguments -> exit code; help: address of a text or of a function that gives one.

    takes_paths: whether words that are no key=value may follow it.
    """

    summary: str
    run: str
    help: str
    flags: tuple[str, ...] = ()
    takes_paths: bool = False

    def explain(self) -> str:
        """What `--help` prints."""
        found = _load(self.help)
        return found if isinstance(found, str) else found()


COMMANDS = {
    "train": Command(
        "fine-tune a model as a config says", "finetune.cli:run_train", "finetune.cli:train_help", ("--dry-run",)
    ),
    "data": Command(
        "show what a config's rows are and become", "finetune.commands.data:run_data", "finetune.commands.data:HELP"
    ),
    "data convert": Command(
        "write rows of any format as messages",
        "finetune.commands.data_convert:run_convert",
        "finetune.commands.data_convert:HELP",
    ),
    "plan": Command(
        "say whether a run fits and how long it takes",
        "finetune.commands.plan:run_plan",
        "finetune.commands.plan:plan_help",
        ("--json",),
    ),
    "cache": Command(
        "write down what a config's teacher says of its rows",
        "finetune.commands.cache:run_cache",
        "finetune.commands.cache:HELP",
    ),
    "eval": Command(
        "measure an adapter or a model, and what quantizing took from it",
        "finetune.commands.eval:run_eval",
        "finetune.commands.eval:eval_help",
        ("--json",),
    ),
    "sensitivity": Command(
        "measure what each layer loses in 4 or 8 bit",
        "finetune.commands.sensitivity:run_sensitivity",
        "finetune.commands.sensitivity:sensitivity_help",
    ),
    "allocate": Command(
        "choose 4, 8 or 16 bits for each layer, within a budget",
        "finetune.commands.allocate:run_allocate",
        "finetune.commands.allocate:allocate_help",
    ),
    "merge": Command(
        "put an adapter into its base's weights, proven",
        "finetune.commands.merge:run_merge",
        "finetune.commands.merge:merge_help",
    ),
    "export": Command(
        "write a model for llama.cpp, Ollama, ONNX Runtime or a server",
        "finetune.commands.export:run_export",
        "finetune.commands.export:export_help",
    ),
    "report": Command(
        "draw a run's report again",
        "finetune.commands.compare:run_report",
        "finetune.commands.compare:REPORT_HELP",
        takes_paths=True,
    ),
    "compare": Command(
        "put runs beside one another: settings, figures, curves",
        "finetune.commands.compare:run_compare",
        "finetune.commands.compare:compare_help",
        takes_paths=True,
    ),
    "sweep": Command(
        "train with every combination of settings, or search for the best",
        "finetune.commands.sweep:run_sweep",
        "finetune.commands.sweep:sweep_help",
        ("--dry-run",),
    ),
    "chat": Command(
        "talk to a base model or to a trained adapter", "finetune.commands.chat:run_chat", "finetune.commands.chat:HELP"
    ),
    "doctor": Command(
        "check this machine and say what to install",
        "finetune.commands.doctor:run_doctor",
        "finetune.commands.doctor:HELP",
        ("--json",),
    ),
}

TRAIN_USAGE = """\
usage: finetune train config=X.yaml [key=value …] [--dry-run]
       accelerate launch finetune/train.py config=X.yaml [key=value …]

Fine-tunes a model as the config says. X.yaml is looked up here, in ./configs, then among the packaged configs.
  --dry-run   print the resolved config with the plan, and stop

Examples
  finetune train config=quickstart.yaml
  finetune train config=lora.yaml model=qwen2.5-0.5b-instruct 'data.train=[{path: rows.jsonl}]'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; never raises. Returns: the exit code, see finetune.system.errors."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _collect_seldom()
    try:
        exit_code = _dispatch(words)
        sys.stdout.flush()  # here, where a reader that has gone is still our business
        return exit_code
    except FinetuneError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl+C", 130)
    except BrokenPipeError:
        # The reader of stdout has gone (`… | head`): nobody is left to tell, and Python must not flush into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last frame: whatever it is must become a message and an exit code
        if advice := _resource_advice(error):
            return _fail(f"{advice} ({error})", 4)
        traceback.print_exc()
        return _fail(
            f"this is a bug in finetune {__version__} ({type(error).__name__}); please report it with the lines above",
            1,
        )


def run_train(arguments: Arguments) -> int:
    """`finetune train`: the recipe on a config."""
    from finetune.config.compose import load_config

    if arguments.config is None:
        raise InputError(f"finetune train needs config=X.yaml; packaged: {', '.join(_packaged_configs())}")
    config = load_config(arguments.config, arguments.overrides)

    if "--dry-run" in arguments.flags:
        from finetune.planning.describe import dry_run

        print(dry_run(config))
        return 0

    from finetune.data.loader import check_sources

    check_sources(config.data)  # before torch, which takes ten times as long to import as this takes in all

    from finetune.training.recipe import train

    train(config)
    return 0


def train_help() -> str:
    """The usage of `finetune train` and every key of a config."""
    from finetune.config.help import schema_help

    return f"{TRAIN_USAGE}\nPackaged configs: {', '.join(_packaged_configs())}\n\n{schema_help()}"


@functools.cache
def _collect_seldom() -> None:
    """Libraries are half a million objects that stay: looking through them, while they come and once more as the
    process ends, was 4 of the 18 seconds of a run whose rows could not be meant."""
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
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    arguments = parse_arguments(rest, command.flags, command.takes_paths)
    if "--help" in arguments.flags:
        print(command.explain())
        return 0
    return _load(command.run)(arguments)


def _overview() -> str:
    commands = "\n".join(f"  {name:<12} {command.summary}" for name, command in COMMANDS.items())
    return f"""\
finetune {__version__}: fine-tune Qwen2.5 models in 4-bit

usage: finetune <command> [config=X.yaml] [key=value …] [--flags]

{commands}

Examples
  finetune doctor
  finetune data config=quickstart.yaml show=3
  finetune train config=quickstart.yaml
  finetune chat adapter=outputs/quickstart
  finetune merge adapter=outputs/quickstart out=merged

`finetune <command> --help` explains a command."""


def _load(address: str) -> Callable:
    module, name = address.split(":")
    return getattr(importlib.import_module(module), name)


def _packaged_configs() -> list[str]:
    from finetune.system.resources import packaged

    return sorted(file.name for file in packaged("configs").glob("*.yaml"))


def _resource_advice(error: BaseException) -> str | None:
    """What to do about an error that means memory or disk ran out; None for any other."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU ran out of memory; lower train.micro_batch_size or data.max_length, or set "
            "train.gradient_checkpointing=all "
            "(or offload, which takes less still)"
        )
    # torch's CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return (
            "memory ran out; lower train.micro_batch_size or data.max_length, set "
            "train.gradient_checkpointing=all, or choose a "
            "smaller model"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free space or set output_dir to another disk, then go on with train.resume=auto"
    return None


def _fail(message: str, exit_code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' (rank {rank})'}: {printable(message)}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
