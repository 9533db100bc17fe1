"""usage: finetune schema [> FILE]

Prints the JSON Schema of a run's config. An editor with a YAML language server uses it for completion and checks: start
a config with `# yaml-language-server: $schema=finetune.schema.json`.

Example
  finetune schema > finetune.schema.json
"""

from __future__ import annotations

import json

from finetune.commands.base import Command
from finetune.system.arguments import Arguments


def run(arguments: Arguments) -> int:
    """Print the schema."""
    from finetune.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


COMMAND = Command("schema", __doc__, run)
