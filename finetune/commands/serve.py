"""usage: finetune serve adapter=FOLDER | model=NAME [adapters={NAME: FOLDER, …}] [port=8000] [key=value …]

Answers requests of the OpenAI API, with the base and every adapter as a model of its own. Before it is ready, its
log-probabilities on held-out rows are compared with those of the trained model.

Examples
  finetune serve adapter=outputs/quickstart
  finetune serve adapter=outputs/a 'adapters={b: outputs/b, c: outputs/c}' port=9000
  finetune serve model=outputs/merged quant.type=none serve.check=outputs/quickstart
  finetune chat url=http://127.0.0.1:8000
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.config.command_options import ServeOptions


def run(arguments: Arguments) -> int:
    """Load the model, compare it with the trained one, and answer until SIGTERM or Ctrl+C."""
    from finetune.models.adapters.base_config import find_base_config
    from finetune.models.adapters.folder import find_adapter
    from finetune.serving.adapters import check_bases, find_adapters

    # All of it before torch is imported, which takes ten times as long.
    options, gguf = arguments.options, _gguf_of(arguments.options)
    adapters = find_adapters(options)
    first = next(iter(adapters.values()), None)
    if gguf is not None:
        options = options.model_copy(update={"model": None})
        first = first or find_adapter(options.serve.check, "serve.check")
    config = find_base_config("finetune serve", arguments.config, options.model, first, arguments.overrides)
    chosen = options.model is not None or any(word.startswith("model.name=") for word in arguments.overrides)
    check_bases(adapters, config.model, chosen=chosen, log=log)
    if options.engine != "embedded":
        from finetune.serving.external import serve_external

        return serve_external(config, options, adapters, gguf)
    from finetune.serving.server import serve

    return serve(config, options, adapters)


def _gguf_of(options: ServeOptions) -> Path | None:
    """Return the GGUF file that is named as the model. Raises: InputError if it cannot be served."""
    if options.model is None or not options.model.endswith(".gguf"):
        return None
    file = Path(options.model).expanduser()
    if options.engine != "llamacpp":
        raise InputError(f"model={file}: only engine=llamacpp serves GGUF, found engine={options.engine}")
    if not file.is_file():
        raise InputError(f"model={file}: is not a file")
    if options.adapter is None and not options.adapters and options.serve.check is None:
        raise InputError(f"model={file}: what it must answer is unknown\nhelp: add serve.check=RUN of its adapter")
    return file


COMMAND = Command("serve", __doc__, run, options="ServeOptions", config="optional")
