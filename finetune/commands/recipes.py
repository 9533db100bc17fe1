"""usage: finetune recipes [NAME] [out=mine.yaml]

Lists the packaged recipes: configs for common tasks and cards, with memory, speed and score. NAME prints one, out=
copies it. A recipe is a config like any other: finetune train config=recipes/NAME

Examples
  finetune recipes
  finetune recipes classify
  finetune recipes classify out=mine.yaml
"""

from __future__ import annotations

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import InputError

NOTE = """
memory, tokens/s: predicted by finetune plan for this card; on a CPU, measured
exact match: measured on the embedded base, before and after a training of minutes
next: finetune recipes NAME"""


def run(arguments: Arguments) -> int:
    """List the recipes, print one, or copy it."""
    from finetune.config.recipes import read_recipe, recipe_table

    names, out = arguments.paths, arguments.options.out
    if len(names) > 1 or (out and not names):
        raise InputError(f"finetune recipes: expected one name, found {' '.join(names) or 'none'}")
    if not names:
        print(recipe_table())
        print(NOTE)
        return 0
    recipe = read_recipe(names[0])
    if out is None:
        print(recipe.written_as(f"recipes/{recipe.name}.yaml"), end="")
        return 0
    if not out.endswith(".yaml"):
        raise InputError(f"out={out}: the name of a config ends in .yaml")
    with whole_file("out", out, replace=False) as stream:
        stream.write(recipe.written_as(out))
    log(f"config: {out}\nnext: finetune train config={out} data.train=rows.jsonl")
    return 0


def _names() -> list[str]:
    from finetune.config.recipes import recipe_names

    return recipe_names()


COMMAND = Command("recipes", __doc__, run, options="RecipesOptions", takes_paths=True, names=_names)
