"""Shell completion, written from the parser, so that it cannot fall behind it."""

from __future__ import annotations

import argparse
import shlex

from convsplit.cli.parser import COMMANDS, build_parser

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """The script for a shell; names and options of every command, and files."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _options(name: str) -> dict[str, str]:
    """Long options of a command with their help."""
    return {
        option: (action.help or "").replace("%%", "%")
        for action in _parser_of(name)._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def _parser_of(name: str) -> argparse.ArgumentParser:
    actions = build_parser()._actions
    (commands,) = (action for action in actions if isinstance(action, argparse._SubParsersAction))
    parser = commands.choices[name]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _bash() -> str:
    cases = "\n".join(f'        {name}) options="{" ".join(_options(name))}" ;;' for name in COMMANDS)
    return f"""\
_convsplit() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" options
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(COMMANDS)}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _convsplit convsplit"""


def _zsh() -> str:
    names = "\n".join(f"        {shlex.quote(f'{name}:{each.summary}')}" for name, each in COMMANDS.items())
    cases = "\n".join(f"        {name}) options=({' '.join(_options(name))}) ;;" for name in COMMANDS)
    return f"""\
_convsplit() {{
    local -a commands options
    commands=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case "$words[2]" in
{cases}
    esac
    if [[ "$PREFIX" == -* ]]; then compadd -- $options; else _files; fi
}}
compdef _convsplit convsplit"""


def _fish() -> str:
    lines = ["complete -c convsplit -e"]
    for name, each in COMMANDS.items():
        lines.append(f"complete -c convsplit -n __fish_use_subcommand -f -a {name} -d {shlex.quote(each.summary)}")
        lines += [
            f"complete -c convsplit -n '__fish_seen_subcommand_from {name}' -l {option[2:]} -d {shlex.quote(text)}"
            for option, text in _options(name).items()
        ]
    return "\n".join(lines)
