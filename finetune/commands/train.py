"""usage: finetune train config=X.yaml [key=value …] [--dry-run] [--verbose]
       accelerate launch finetune/train.py config=X.yaml [key=value …]

Fine-tunes a model as the config describes. X.yaml is searched here, in ./configs, then among the packaged configs.
  --dry-run   print the settings that differ from the defaults, and the plan, then stop
  --verbose   print the whole plan, threads and kernels too; with --dry-run every setting
  --help-all  describe every key of a config

Examples
  finetune train config=quickstart.yaml
  finetune train config=lora.yaml model=qwen2.5-0.5b-instruct data.train=rows.jsonl
  finetune train config=grpo.yaml reward_function=my_reward.py:score
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import line_width
from finetune.system.resources import packaged_configs

# The keys that most runs set, in the order of the schema.
COMMON = (
    "output_dir model.name quant.type lora.rank lora.alpha lora.target_modules data.train data.held_out "
    "data.max_length data.packing train.epochs train.max_steps train.batch_size train.learning_rate train.eval_every "
    "train.save_every train.resume".split()
)


def run(arguments: Arguments) -> int:
    """Run the training recipe on a config."""
    from finetune.config.compose import load_config
    from finetune.data.early_checks import check_sources
    from finetune.objectives.user_rewards import check_rewards, load_reward_function, user_rewards

    config, verbose = load_config(str(arguments.config), arguments.overrides), "--verbose" in arguments.flags
    named = arguments.options.reward_function
    words = [named] if isinstance(named, str) else named
    check_rewards(config, words)
    if "--dry-run" in arguments.flags:
        from finetune.planning.describe import dry_run

        check_sources(config, download=False)
        print(dry_run(config, verbose))
        return 0

    from finetune.training.output_folder import check_run

    # These take a tenth of the time of importing torch.
    check_sources(config)
    check_run(config)
    functions = user_rewards([load_reward_function(word) for word in words])

    from finetune.training.recipe import train

    train(config, verbose=verbose, reward_functions=functions)
    return 0


def common_keys() -> str:
    """Return the names of the packaged configs and the keys that most runs set."""
    return f"{_keys(COMMON)}\n\nEvery key: finetune train --help-all"


def all_keys() -> str:
    """Return the names of the packaged configs and every key of a config."""
    return _keys(())


def _keys(only: Sequence[str]) -> str:
    from finetune.config.keys import schema_help

    configs = textwrap.fill(f"Packaged configs: {', '.join(packaged_configs())}", line_width(), subsequent_indent="  ")
    return f"{configs}\n\n{schema_help(only=only)}"


COMMAND = Command(
    "train",
    __doc__,
    run,
    options="TrainOptions",
    flags=("--dry-run", "--verbose", "--help-all"),
    config="required",
    details=common_keys,
    all_details=all_keys,
)
