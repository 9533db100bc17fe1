"""usage: finetune completion bash|zsh|fish

Prints a script for the shell. It completes commands, flags, keys and the names of packaged configs and recipes.

Examples
  finetune completion bash >> ~/.bashrc
  finetune completion zsh >> ~/.zshrc
  finetune completion fish > ~/.config/fish/completions/finetune.fish
"""

from __future__ import annotations

from finetune.commands.base import COMMANDS, Command, load_command
from finetune.system.arguments import Arguments
from finetune.system.errors import InputError
from finetune.system.resources import packaged_configs

_BASH = """\
_finetune() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" words
    local word="${{line##* }}"
    case "${{line#* }}" in
{commands}
        *) words='{first} --help --version' ;;
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
{commands}
        *) words_of_command=({first} --help --version) ;;
    esac
    compadd -- ${{(M)words_of_command:#*[^=]}} && compadd -S '' -- ${{(M)words_of_command:#*=}}
    _files
}}
compdef _finetune finetune"""
_FISH = """\
complete -c finetune -n __fish_use_subcommand -f -a '{first}'
{commands}"""
# The script of each shell, and its line for the words after one command.
_SHELLS = {
    "bash": (_BASH, "        \"{name} \"*) words='{words}' ;;"),
    "zsh": (_ZSH, '        "{name} "*) words_of_command=({words}) ;;'),
    "fish": (_FISH, "complete -c finetune -n '__fish_seen_subcommand_from {last}' -a '{words}'"),
}


def run(arguments: Arguments) -> int:
    """Print the script of the shell."""
    shell = " ".join(arguments.paths)
    if shell not in _SHELLS:
        raise InputError(f"finetune completion: expected bash, zsh or fish, found {shell or 'nothing'}")
    script, line = _SHELLS[shell]
    commands = [
        line.format(name=name, last=name.split()[-1], words=" ".join(words)) for name, words in _candidates().items()
    ]
    print(script.format(commands="\n".join(commands), first=" ".join(name for name in COMMANDS if " " not in name)))
    return 0


def _candidates() -> dict[str, list[str]]:
    """Return the words that may follow each command; the longest names come first."""
    from finetune.config.keys import schema_fields

    found = {}
    for name in sorted(COMMANDS, key=len, reverse=True):
        command = load_command(name)
        words = [other.removeprefix(f"{name} ") for other in COMMANDS if other.startswith(f"{name} ")]
        words += command.names() if command.names else []
        words += ["--help", *command.flags]
        keys = list(schema_fields(schema)) if (schema := command.schema()) else []
        if command.config != "none":
            words += [f"config={file}" for file in packaged_configs()]
            keys += schema_fields()
        words += [f"{key}=" for key in keys if "*" not in key]
        found[name] = list(dict.fromkeys(words))
    return found


COMMAND = Command("completion", __doc__, run, takes_paths=True, names=lambda: list(_SHELLS))
