"""`finetune completion`: print a script that completes commands, flags and keys in a shell."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.commands.base import COMMANDS, Command, load_command, packaged_configs
from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

USAGE = """\
usage: finetune completion bash|zsh|fish

Prints a script for the shell. It completes commands, flags, keys and the names of packaged configs.

Examples
  finetune completion bash >> ~/.bashrc
  finetune completion zsh >> ~/.zshrc
  finetune completion fish > ~/.config/fish/completions/finetune.fish
"""
_BASH = """\
_finetune() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" words
    local word="${{line##* }}"
    case "${{line#* }}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    # Bash replaces only the text after the last = of a word.
    [[ $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}")
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}}
complete -o default -F _finetune finetune"""
_ZSH = """\
_finetune() {{
    local -a words_of_command
    case "${{words[2,CURRENT-1]}} " in
{cases}
    esac
    compadd -- ${{(M)words_of_command:#*[^=]}} && compadd -S '' -- ${{(M)words_of_command:#*=}}
    _files
}}
compdef _finetune finetune"""


def run(arguments: Arguments) -> int:
    """Print the script of the shell."""
    shells = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if len(arguments.paths) != 1 or arguments.paths[0] not in shells:
        found = " ".join(arguments.paths) or "nothing"
        raise InputError(f"finetune completion: expected bash, zsh or fish, found {found}")
    print(shells[arguments.paths[0]](_candidates()))
    return 0


def _candidates() -> dict[str, list[str]]:
    """Return the words that may follow each command; the longest names come first."""
    from finetune.config.keys import schema_fields

    found = {}
    for name in sorted(COMMANDS, key=len, reverse=True):
        command = load_command(name)
        words = [other.removeprefix(f"{name} ") for other in COMMANDS if other.startswith(f"{name} ")]
        words += ["--help", *command.flags]
        keys = list(schema_fields(schema)) if (schema := command.schema()) else []
        if command.config != "none":
            words += [f"config={file}" for file in packaged_configs()]
            keys += schema_fields()
        words += [f"{key}=" for key in keys if "*" not in key]
        found[name] = list(dict.fromkeys(words))
    return found


def _first_words() -> list[str]:
    return [name for name in COMMANDS if " " not in name]


def _bash(candidates: Mapping[str, list[str]]) -> str:
    lines = [f"        \"{name} \"*) words='{' '.join(words)}' ;;" for name, words in candidates.items()]
    lines.append(f"        *) words='{' '.join(_first_words())} --help --version' ;;")
    return _BASH.format(cases="\n".join(lines))


def _zsh(candidates: Mapping[str, list[str]]) -> str:
    lines = [f'        "{name} "*) words_of_command=({" ".join(words)}) ;;' for name, words in candidates.items()]
    lines.append(f"        *) words_of_command=({' '.join(_first_words())} --help --version) ;;")
    return _ZSH.format(cases="\n".join(lines))


def _fish(candidates: Mapping[str, list[str]]) -> str:
    lines = [f"complete -c finetune -n __fish_use_subcommand -f -a '{' '.join(_first_words())}'"]
    for name, words in candidates.items():
        lines.append(f"complete -c finetune -n '__fish_seen_subcommand_from {name.split()[-1]}' -a '{' '.join(words)}'")
    return "\n".join(lines)


COMMAND = Command(
    "completion", "print a script that completes words in bash, zsh or fish", USAGE, run, takes_paths=True
)
