"""The list of commands, and the record that each of them defines.

The module of a command opens with its `--help`. It imports nothing heavy at its top, so that help stays fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from finetune.system.arguments import Arguments, parse_arguments
from finetune.system.errors import InputError
from finetune.system.resources import packaged_configs

if TYPE_CHECKING:
    from finetune.config.schema import Section

# Each name with its summary; the module of `data convert` is finetune.commands.data_convert.
COMMANDS = {
    "train": "fine-tune a model as a config describes",
    "init": "write a first config for a dataset and this machine",
    "recipes": "list ready configs by task and card, and copy one",
    "migrate": "write a config from one of Axolotl, LLaMA-Factory, ms-swift, TRL or Unsloth",
    "data": "report on the rows of a config",
    "data convert": "write rows of any format as messages",
    "plan": "predict whether a run fits into memory and how long it takes",
    "cache": "write the teacher's outputs for the rows of a config",
    "eval": "measure a model on held-out rows, and what quantization changed",
    "sensitivity": "measure the quantization error of each layer in 4 or 8 bit",
    "allocate": "choose 4, 8 or 16 bits for each layer, within a budget",
    "merge": "add an adapter to the weights of its base",
    "export": "write a model for llama.cpp, Ollama, ONNX Runtime or a server",
    "clip": "limit the update of a federated party, and add noise to it",
    "aggregate": "average the adapters of federated parties",
    "push": "upload an adapter or a model to the model hub",
    "report": "draw the report of a run again",
    "watch": "serve the report of a run while it trains",
    "compare": "show runs side by side: settings, metrics, curves",
    "sweep": "train with every combination of settings, or search for the best",
    "serve": "answer requests of the OpenAI API with a model and its adapters",
    "chat": "chat with a base model or a trained adapter",
    "doctor": "check this machine and its packages",
    "schema": "print the JSON Schema of a config, for editors",
    "completion": "print a script that completes words in bash, zsh or fish",
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command of `finetune`.

    Attributes:
        name: words after `finetune`.
        usage: text of `--help`, with a description and examples; the options follow. None under `python -OO`.
        run: does the work and returns the exit code. It gets the options read and checked.
        options: name of the schema in config/command_options.py; empty for a command without options.
        flags: words such as `--json`.
        config: whether config=X.yaml and the keys of a run's config are taken.
        takes_paths: whether words without `=` are taken.
        names: returns such words that a shell completes.
        details: returns text that follows the options in `--help`.
        all_details: returns that text for `--help-all`, a flag of a command that has it.
    """

    name: str
    usage: str | None
    run: Callable[[Arguments], int]
    options: str = ""
    flags: tuple[str, ...] = ()
    config: Literal["required", "optional", "none"] = "none"
    takes_paths: bool = False
    names: Callable[[], list[str]] | None = None
    details: Callable[[], str] | None = None
    all_details: Callable[[], str] | None = None

    def execute(self, words: Sequence[str]) -> int:
        """Run the command with the words that follow its name, and return the exit code."""
        arguments = parse_arguments(words, self.flags, self.takes_paths)
        if "--help-all" in arguments.flags:
            print(replace(self, details=self.all_details).help())
            return 0
        if "--help" in arguments.flags:
            print(self.help())
            return 0
        return self.run(self._read_options(arguments))

    def help(self) -> str:
        """Return the text of `--help`."""
        parts = [(self.usage or "").rstrip("\n")]
        if schema := self.schema():
            from finetune.config.keys import schema_help

            parts.append(schema_help(schema, width=24))
        if self.details:
            parts.append(self.details())
        elif self.config != "none":
            parts.append("Every key of a run's config can be given as well: finetune train --help-all")
        return "\n\n".join(parts)

    def schema(self) -> type[Section] | None:
        """Return the schema of the options."""
        if not self.options:
            return None
        return getattr(importlib.import_module("finetune.config.command_options"), self.options)

    def missing_config(self) -> InputError:
        """Return the error for a command line without config=."""
        advice = f"help: {self._example()}\nhelp: packaged configs: {', '.join(packaged_configs())}"
        return InputError(f"finetune {self.name}: config=X.yaml is missing\n{advice}")

    def _example(self) -> str:
        lines = [line.strip() for line in (self.usage or "").splitlines()]
        return next((line for line in lines if line.startswith(f"finetune {self.name}")), f"finetune {self.name}")

    def _read_options(self, arguments: Arguments) -> Arguments:
        if arguments.config is None and self.config == "required":
            if (config := default_config(arguments.overrides)) is None:
                raise self.missing_config()
            arguments = replace(arguments, config=config)
        refused = "config" if arguments.config is not None else "settings" if arguments.overrides else ""
        if self.config == "none" and (refused == "config" or (refused and not self.options)):
            found = f"config={arguments.config}" if refused == "config" else arguments.overrides[0]
            raise InputError(f"finetune {self.name}: takes no {refused}, found {found}\nhelp: {self._example()}")
        if (schema := self.schema()) is None:
            return arguments
        from finetune.config.overrides import read_beside_config, read_options

        command = f"finetune {self.name}"
        if self.config == "none":
            return replace(arguments, options=read_options(schema, arguments.overrides, command), overrides=())
        options, overrides = read_beside_config(schema, arguments, command)
        return replace(arguments, options=options, overrides=tuple(overrides))


def default_config(overrides: Sequence[str]) -> str | None:
    """Return lora.yaml if the words name a model, else None: a model and data are all that a run needs."""
    return "lora.yaml" if any(word.startswith(("model=", "model.name=")) for word in overrides) else None


def load_command(name: str) -> Command:
    """Import the module of a command and return its record."""
    return importlib.import_module(f"finetune.commands.{name.replace(' ', '_')}").COMMAND
