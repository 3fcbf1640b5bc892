"""A conversation in the terminal: `minirlhf chat FOLDER|RUN [FOLDER|RUN]`.

What is said stands on stdout, facts on stderr. Where stdin is no terminal each line of it is a
message, so that a conversation can be a file.
"""

import sys
from contextlib import suppress

from minirlhf import console
from minirlhf.errors import OK, UserError, run
from minirlhf.models import pretrained
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.setup.common import check_base
from minirlhf.tools.chat.conversation import Conversation, Member
from minirlhf.tools.chat.keyboard import lines
from minirlhf.tools.chat.load import Loader, names_of
from minirlhf.tools.sample import sampling_of
from minirlhf.tools.sampling_settings import ChatConfig


def tell(config: ChatConfig, members: list[Member]) -> None:
    """The facts, and how a conversation goes."""
    for member in members:
        speaker = member.speaker
        size = sum(p.numel() for p in speaker.lm.parameters())
        _, drawn = sampling_of(config, speaker.folder, speaker.is_chat)
        facts = f"{size / 1e6:.1f} M parameters, reads {speaker.positions:,} tokens"
        print(f"{speaker.name}: {facts}\n  sampling: {drawn}", file=sys.stderr)
    if bare := [m.speaker.name for m in members if not m.speaker.is_chat]:
        why = "--raw" if config.raw else "no chat template"
        rest = "" if config.raw else " (--chat: turns by a plain template)"
        print(f"{', '.join(bare)}: {why}: each line is a text to complete, by itself{rest}",
              file=sys.stderr)
    print("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(ChatConfig, argv, "minirlhf chat")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    loader = Loader(config, dtype, device)
    looked = [loader.look(place) for place in config.model]
    check_base(config, *(folder for _, folder, _ in looked))
    for line in pretrained.remarks([folder for _, folder, _ in looked], dtype):
        print(f"warning: {line}", file=sys.stderr)
    names = names_of(config.model)
    members = [Member(*loader.speaker(name, *one)) for name, one in zip(names, looked, strict=True)]
    if config.system and not all(member.speaker.is_chat for member in members):
        raise UserError("--system", "a model without chat template has no system turn",
                        "leave it out, or give --chat")
    tell(config, members)
    with suppress(AttributeError):  # a stream of Python's own
        sys.stdin.reconfigure(errors="surrogateescape")
    talk = Conversation(members, config.seed)
    for line in lines(sys.stdin.isatty()):
        if not talk.hear(line):
            break
        console.check()
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
