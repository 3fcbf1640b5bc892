"""Scripts that let bash, zsh and fish complete a command line, made from declared settings.

A script holds every word itself: at the tab key no Python starts. What a flag's value may be stands
where the setting is declared: its choices, or a file.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from minirlhf.run.config_file import presets_of
from minirlhf.run.settings import Setting, settings_of

PROGRAM = "minirlhf"
_FOLDERS = ("FOLDER", "DIR")  # metavars


class Flag(NamedTuple):
    name: str
    help: str
    takes: str  # "nothing", "text", "file", "folder" or "choice"
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A verb, as a shell has to know it."""

    help: str
    flags: list[Flag]
    first: str  # what its first word may be beside a flag, as `Flag.takes`; "nothing": no such word
    choices: tuple[str, ...] = ()


def command(what: str, config_class: type | None) -> Command:
    """A verb of these settings; None: one that reads its words itself."""
    flags = [Flag("--help", "show the settings and leave", "nothing")]
    if config_class is None:
        return Command(what, flags, "nothing")
    settings = settings_of(config_class)
    if len(getattr(config_class, "SHOWN_FIRST", settings)) < len(settings):
        flags.append(Flag("--help-all", "show every setting and leave", "nothing"))
    flags.append(Flag("--config", "file of settings", "file"))
    if names := tuple(presets_of(config_class)):
        flags += [Flag("--preset", "settings as another has them", "choice", names),
                  Flag("--explain-preset", "show what a preset sets", "choice", names)]
    for item in settings.values():
        flags.append(Flag(item.flag, item.help, *_takes(item)))
        if item.type is bool:
            flags.append(Flag(f"--no-{item.flag[2:]}", f"not: {item.help}", "nothing"))
    first = getattr(config_class, "FIRST_WORDS", None)
    return Command(what, flags, *(_takes(settings[first]) if first else ("nothing",)))


def _takes(item: Setting) -> tuple[str, tuple[str, ...]]:
    if item.type is bool:
        return "nothing", ()
    if item.choices:
        return "choice", tuple(map(str, item.choices))
    if item.is_place:
        return ("folder" if item.metavar in _FOLDERS else "file"), ()
    return "text", ()


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script for a shell, bash, zsh or fish, of verb -> its command."""
    return {"bash": bash, "zsh": zsh, "fish": fish}[shell](commands)


def quoted(text: str) -> str:
    """Text as one word in single quotes, in which all three shells change nothing."""
    return "'" + text.replace("\\", "").replace("'", "") + "'"


def _short(text: str) -> str:
    """The first clause of a help text, of at most 60 characters."""
    clause = re.split(r"[;:(]", text, maxsplit=1)[0].strip()
    return clause if len(clause) <= 60 else clause[:59] + "…"


# ------------------------------------------------------------------------------------- the shells


def bash(commands: Mapping[str, Command]) -> str:
    """For bash 3.2 and later: `source <(minirlhf completion bash)`, or in a file that is read."""
    cases, values = [], []
    for verb, made in commands.items():
        cases.append(f"    {verb}) flags={quoted(' '.join(f.name for f in made.flags))};"
                     f" first={made.first}; choices={quoted(' '.join(made.choices))} ;;")
        for takes in ("file", "folder", "text"):
            if names := [f.name for f in made.flags if f.takes == takes]:
                them = "|".join(f"{verb}:{name}" for name in names)
                values.append(f"    {them}) takes={takes} ;;")
        values += [f"    {verb}:{f.name}) takes=choice; choices={quoted(' '.join(f.choices))} ;;"
                   for f in made.flags if f.takes == "choice"]
    return f"""\
# completion of {PROGRAM} for bash: put  source <({PROGRAM} completion bash)  into ~/.bashrc
_{PROGRAM}() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" takes= flags= first= choices= i
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {quoted(' '.join([*commands, '--help', '--version']))} -- "$word"))
    return
  fi
  case "$verb" in
{chr(10).join(cases)}
    *) return ;;
  esac
  takes=none
  [ "$COMP_CWORD" -eq 2 ] && takes=$first
  i=$((COMP_CWORD - 1))  # of several values each belongs to the flag before them
  while [ "$i" -gt 1 ] && [ "${{COMP_WORDS[i]#-}}" = "${{COMP_WORDS[i]}}" ]; do i=$((i - 1)); done
  [ "$i" -gt 1 ] && case "$verb:${{COMP_WORDS[i]}}" in
{chr(10).join(values)}
    *) takes=nothing ;;
  esac
  case "$word" in -*) COMPREPLY=($(compgen -W "$flags" -- "$word")); return ;; esac
  case "$takes" in
    choice) COMPREPLY=($(compgen -W "$choices" -- "$word")) ;;
    folder) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$word")) ;;
    file) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word")) ;;
    none|nothing) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
  esac
}}
complete -F _{PROGRAM} {PROGRAM}
"""


def zsh(commands: Mapping[str, Command]) -> str:
    """For zsh: `source <(minirlhf completion zsh)`, or as _minirlhf in a folder of $fpath."""
    verbs = " ".join(quoted(f"{name}:{made.help.replace(':', '')}")
                     for name, made in commands.items())
    cases = []
    for verb, made in commands.items():
        specs = [quoted(f"*{f.name}[{_plain(f.help)}]{_zsh_value(f.takes, f.choices)}")
                 for f in made.flags]
        specs += [quoted(f"1{_zsh_value(made.first, made.choices)}")] * (made.first != "nothing")
        cases.append(f"    {verb}) _arguments {' '.join(specs)} ;;")
    return f"""\
#compdef {PROGRAM}
# completion of {PROGRAM} for zsh: source <({PROGRAM} completion zsh)  behind compinit in ~/.zshrc
_{PROGRAM}() {{
  local -a verbs
  verbs=({verbs})
  if (( CURRENT == 2 )); then
    _describe verb verbs
    return
  fi
  local verb=$words[2]
  shift words
  (( CURRENT-- ))
  case $verb in
{chr(10).join(cases)}
  esac
}}
if [[ $funcstack[1] == _{PROGRAM} ]]; then _{PROGRAM} "$@"; else compdef _{PROGRAM} {PROGRAM}; fi
"""


def _plain(text: str) -> str:
    return re.sub(r"[][:]", "", _short(text))


def _zsh_value(takes: str, choices: tuple[str, ...]) -> str:
    actions = {"nothing": "", "text": ":value: ", "file": ":file:_files",
               "folder": ":folder:_files -/"}
    return f":value:({' '.join(choices)})" if takes == "choice" else actions[takes]


def fish(commands: Mapping[str, Command]) -> str:
    """For fish: `minirlhf completion fish | source`, or as minirlhf.fish in its completions."""
    lines = [f"# completion of {PROGRAM} for fish: "
             f"{PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish",
             f"complete -c {PROGRAM} -e", f"complete -c {PROGRAM} -f"]
    lines += [f"complete -c {PROGRAM} -n __fish_use_subcommand -a {name} -d {quoted(made.help)}"
              for name, made in commands.items()]
    values = {"nothing": "", "text": " -x", "file": " -rF",
              "folder": " -xa '(__fish_complete_directories)'"}
    for verb, made in commands.items():
        seen = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {verb}'"
        for flag in made.flags:
            value = f" -xa {quoted(' '.join(flag.choices))}" if flag.takes == "choice" else (
                values[flag.takes])
            lines.append(f"{seen} -l {flag.name[2:]}{value} -d {quoted(_short(flag.help))}")
        if made.first == "choice":
            lines.append(f"{seen} -a {quoted(' '.join(made.choices))}")
        elif made.first == "folder":
            lines.append(f"{seen} -a '(__fish_complete_directories)'")
        elif made.first == "file":
            lines.append(f"{seen} -F")
    return "\n".join(lines) + "\n"
