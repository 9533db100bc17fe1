"""usage: finetune serve adapter=FOLDER | model=NAME [adapters={NAME: FOLDER, …}] [port=8000] [key=value …]

Answers requests of the OpenAI API, with the base and every adapter as a model of its own. Before it is ready, its
log-probabilities on held-out rows are compared with those of the trained model.

Examples
  finetune serve adapter=outputs/quickstart
  finetune serve adapter=outputs/a 'adapters={b: outputs/b, c: outputs/c}' port=9000
  finetune serve model=outputs/merged serve.check=outputs/quickstart
  finetune chat url=http://127.0.0.1:8000
"""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.errors import InputError


def run(arguments: Arguments) -> int:
    """Load the model, compare it with the trained one, and answer until SIGTERM or Ctrl+C."""
    options = arguments.options
    if options.adapter is None and options.model is None and arguments.config is None:
        raise InputError("finetune serve: adapter=FOLDER, model=NAME or config=X.yaml is missing")
    raise NotImplementedError


COMMAND = Command("serve", __doc__, run, options="ServeOptions", config="optional")
