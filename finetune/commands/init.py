"""usage: finetune init DATA [out=finetune.yaml] [model=NAME] [gpu=4090] [key=value …]

Reads a dataset, and writes a commented config for it: format, a model that fits this machine (or the GPU of gpu= or
gpu_gb=), the packed length, epochs, evaluations. Prints the predicted memory and time. Asks nothing, loads no model.
Keys of a source describe a dataset with its own columns or roles.

Examples
  finetune init rows.jsonl
  finetune init faq.csv 'columns={prompt: question, completion: answer}' out=faq.yaml
  finetune init rows.jsonl gpu=t4 model=qwen2.5-3b-instruct
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import InputError
from finetune.system.format import format_bytes, format_estimate

if TYPE_CHECKING:
    from finetune.planning.starter import DataFacts, Starter


def run(arguments: Arguments) -> int:
    """Write the config, and print what was found."""
    options = arguments.options
    if len(arguments.paths) + bool(options.path) != 1:
        found = " ".join([*arguments.paths, options.path]).strip() or "none"
        raise InputError(f"finetune init: expected one dataset, found {found}")
    if not options.out.endswith(".yaml"):
        raise InputError(f"out={options.out}: the name of a config ends in .yaml")
    known = _models()
    if options.model is not None and options.model not in known:
        raise InputError(f"model={options.model}: unknown\nhelp: models: {', '.join(known)}")

    from finetune.config.schema import SourceConfig
    from finetune.data.formats.rules import RowRules
    from finetune.planning.gpus import planned_device
    from finetune.planning.starter import propose, read_facts
    from finetune.system.machine import available_memory

    with whole_file("out", options.out, replace=False) as stream:
        given = options.model_dump(include=set(SourceConfig.model_fields))
        source = SourceConfig(**given | {"path": options.path or arguments.paths[0]})
        kind, free_bytes, machine, gpu_name = planned_device(options.gpu, options.gpu_gb)
        free_bytes = free_bytes or available_memory()
        machine = f"{machine}, {format_bytes(free_bytes)} free"
        rules = RowRules.of(options)
        facts = read_facts(source, rules)
        starter = propose(facts, kind, free_bytes, model=options.model, gpu_name=gpu_name)
        settings = {f"data.{key}": (value, "as given to finetune init") for key, value in rules.changed().items()}
        starter = replace(starter, settings=starter.settings | settings)
        stream.write(_yaml(source, facts, starter, options.out, machine))
    more = "" if facts.complete else "more than "
    files = "".join(f", {kind}={count:,}" for kind, count in facts.files.items())
    log(
        f"data: format={facts.format}, rows={more}{facts.rows:,}, bad_rows={facts.bad_rows:,}{files}, "
        f"tokens per example={facts.median_tokens:,} (median), {facts.longest_tokens:,} (longest), estimated"
    )
    log(f"plan: model={starter.model}, {_prediction(starter, machine)}")
    log(f"config: {options.out}")
    log(f"next: finetune data config={options.out} show=3\n      finetune train config={options.out}")
    return 0


def _models() -> list[str]:
    from finetune.system.resources import packaged

    return sorted(file.stem for file in packaged("configs").glob("model/*-*.yaml"))


def _prediction(starter: Starter, machine: str) -> str:
    time = format_estimate(starter.steps * starter.step_seconds)
    return (
        f"peak={format_bytes(starter.peak_bytes)} ({machine}), steps={starter.steps:,}, "
        f"time={time} ({starter.time_source})"
    )


def _yaml(source: Any, facts: DataFacts, starter: Starter, name: str, machine: str) -> str:
    import yaml

    more = "" if facts.complete else "more than "
    lines = [
        f"# finetune train config={name}",
        "#",
        f"# Written by finetune init for {more}{facts.rows:,} examples of about {facts.median_tokens:,} tokens.",
        f"# Predicted: {_prediction(starter, machine)}",
        "defaults:",
        f"  - model: {starter.model}",
    ]
    section = ""
    for key, (value, reason) in sorted(starter.settings.items(), key=lambda setting: setting[0].partition(".")[0]):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"{section}:")
        if key == "data.train":
            changed = source.model_dump(exclude_defaults=True)
            value = [changed] if len(changed) > 1 else source.path
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        lines.append(f"  {key.partition('.')[2]}: {text.removesuffix('...' + chr(10)).strip()}  # {reason}")
    return "\n".join(lines) + "\n"


COMMAND = Command("init", __doc__, run, options="InitOptions", takes_paths=True)
