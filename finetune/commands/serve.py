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
from finetune.system.console import log


def run(arguments: Arguments) -> int:
    """Load the model, compare it with the trained one, and answer until SIGTERM or Ctrl+C."""
    from finetune.models.adapters.base_config import find_base_config
    from finetune.serving.adapters import check_bases, find_adapters

    # All of it before torch is imported, which takes ten times as long.
    options, model = arguments.options, arguments.options.model
    adapters = find_adapters(options)
    first = next(iter(adapters.values()), None)
    config = find_base_config("finetune serve", arguments.config, model, first, arguments.overrides)
    chosen = model is not None or any(word.startswith("model.name=") for word in arguments.overrides)
    check_bases(adapters, config.model, chosen=chosen, log=log)
    from finetune.serving.server import serve

    return serve(config, options, adapters)


COMMAND = Command("serve", __doc__, run, options="ServeOptions", config="optional")
