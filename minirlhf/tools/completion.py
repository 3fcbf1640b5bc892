"""What a shell needs to complete `minirlhf …`: `minirlhf completion bash`, zsh or fish."""

from collections.abc import Mapping
from typing import Any

from minirlhf.errors import OK
from minirlhf.run import flags
from minirlhf.run.completion import command, script
from minirlhf.tools.settings import CompletionConfig


def main(argv: list[str] | None, verbs: Mapping[str, Any]) -> int:
    """Prints the script of the shell that is asked for.

    Args:
        verbs: name -> what has the settings (by config(), none where they are "") of a verb, and
            says what it does.
    """
    config = flags.parse(CompletionConfig, argv, "minirlhf completion")
    commands = {name: command(verb.what, verb.config() if verb.settings else None)
                for name, verb in verbs.items()}
    print(script(config.shell, commands), end="")
    return OK
