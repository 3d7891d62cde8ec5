"""Completion of commands and flags in a shell.

repvgg --print-completion bash > ~/.local/share/bash-completion/completions/repvgg
"""

from collections.abc import Mapping, Sequence

from repvgg.cli.parse import UsageError

SCRIPT = """{first}_repvgg() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" known
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) known="{commands}" ;;
    esac
    if [[ $COMP_CWORD -eq 1 ]]; then known="{commands}"; fi
    if [[ $COMP_CWORD -eq 1 || $word == -* ]]; then COMPREPLY=($(compgen -W "$known" -- "$word")); fi
}}
complete -o default -F _repvgg repvgg"""


def script(shell: str, flags: Mapping[str, Sequence[str]]) -> str:
    """Return what a shell has to read to complete commands and their flags; where neither fits, it completes file names."""
    if shell not in ("bash", "zsh"):
        raise UsageError(f"--print-completion {shell}: bash or zsh")
    cases = "\n".join(f'        {name}) known="{" ".join(known)}" ;;' for name, known in flags.items())
    first = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return SCRIPT.format(first=first, cases=cases, commands=" ".join(flags))
