"""A script with which a shell completes commands, flags and recipes."""

from __future__ import annotations

from flows.cli.commands import COMMANDS
from flows.cli.recipes import recipes_of
from flows.cli.schema import leaves
from infra.errors import UserError

_PLAIN = ("explain", "compare", "ui", "doctor", "recipes", "completion")
_COMMON = ("--help", "--help-all", "--print-config")

_BASH = """\
_fovea() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"
  else case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="" ;;
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "$word" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$word")) ;; esac
}}
complete -o nospace -F _fovea fovea
"""


def completion_script(shell: str) -> str:
    """The script for a shell.

    Raises:
        UserError: there is none for it.
    """
    if shell not in ("bash", "zsh"):
        raise UserError(f"{shell}: no completion for this shell; there are bash and zsh")
    cases = "\n".join(f'    {name}) words="{" ".join(_words(name))}" ;;' for name in COMMANDS)
    text = _BASH.format(commands=" ".join((*COMMANDS, *_PLAIN)), cases=cases)
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _words(name: str) -> list[str]:
    """What may stand behind a command: recipes and flags."""
    flags = dict.fromkeys(key.flag for key in leaves(COMMANDS[name].model))
    shipped = (
        recipes_of("pretrain" if name == "plan" else name) if name in ("pretrain", "plan", "curate", "distill") else {}
    )
    return [*shipped, *_COMMON, *flags]
