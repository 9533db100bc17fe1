"""usage: finetune migrate FILE [out=migrated.yaml] [framework=…]
       finetune migrate dataset_info.json out=datasets.yaml
       finetune migrate adapter_model.bin out=FOLDER

Writes a config with the same training, and lists the settings without a counterpart. FILE is a YAML or JSON config, or
a shell script with `swift sft` or `trl sft`. The arguments of an Unsloth notebook are read from a JSON file. Never
replaces an existing file.

LLaMA-Factory's dataset_info.json becomes a config with each dataset as an item of data.train.

An adapter_model.bin with its adapter_config.json becomes a folder with adapter_model.safetensors. Only weights are
loaded from the pickle: one that holds code is refused.

Examples
  finetune migrate qlora.yml
  finetune migrate train.sh out=mine.yaml
  finetune migrate unsloth.json framework=unsloth
  finetune migrate data/dataset_info.json out=datasets.yaml
  finetune migrate old/adapter_model.bin out=adapter
"""

from __future__ import annotations

from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import InputError


def run(arguments: Arguments) -> int:
    """Write the config, and print what was lost."""
    from finetune.migration.files import read_peer_config
    from finetune.migration.migrate import as_yaml, migrate

    if len(arguments.paths) != 1:
        raise InputError(f"finetune migrate: expected one FILE, found {' '.join(arguments.paths) or 'none'}")
    options, file = arguments.options, Path(arguments.paths[0]).expanduser()
    if file.suffix == ".bin":
        from finetune.migration.adapters import convert_pickle

        convert_pickle(file, Path(options.out).expanduser())
        log(f"adapter: {options.out}")
        return 0
    if not options.out.endswith(".yaml"):
        raise InputError(f"out={options.out}: the name of a config ends in .yaml")
    config = read_peer_config(file, options.framework)
    migration = migrate(config)
    with whole_file("out", options.out, replace=False) as stream:
        stream.write(as_yaml(migration, config, options.out))
    log(f"{options.out}: framework={config.peer}, settings={len(migration.settings)}, lost={len(migration.lost)}")
    for line in migration.lost:
        log(f"lost: {line}")
    words = migration.words(options.out)
    log(f"next: finetune data {words} show=3\n      finetune train {words}")
    return 0


COMMAND = Command("migrate", __doc__, run, options="MigrateOptions", takes_paths=True)
