"""Chat templates: a model's own Jinja program, rendered as transformers renders it.

A template comes with downloaded weights, so it is a stranger's code. jinja2's immutable sandbox
keeps it from the machine, and a process of its own, template_worker.py, keeps it from taking more
time or memory than it may.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from minirlhf.data import template_worker
from minirlhf.errors import UserError, printable

SOURCE_CAP = 1 << 16  # characters of a template; those in use have some 20,000 at most
SECONDS, LONGEST = 2.0, 30.0  # of work, and in all, for one rendering; most take a millisecond
MEMORY = 1 << 30  # bytes of the process
REPLY_CAP = 1 << 24  # bytes
MEND = "mend the template, or give rows that it takes"


class TemplateOverrun(UserError):
    """A template took more time or memory than it may: it is not tried on another row."""


class _Renderer:
    """The process that renders: started when first asked, and again where it has ended."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.turn = threading.Lock()

    def start(self) -> None:
        import jinja2

        packages = (jinja2, jinja2.utils.markupsafe)
        folders = [str(Path(package.__file__).parents[1]) for package in packages]
        limits = [str(limit) for limit in (SECONDS, LONGEST, MEMORY)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", template_worker.__file__, *limits, *folders],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,  # Ctrl-C at the terminal is for this process, not for that one
        )
        self.replies = open(self.process.stdout.fileno(), "rb", closefd=False)

    def ask(self, request: list, count: int) -> tuple[list, str]:
        """(its `count` replies, ""), or (those before it ended, how it ended)."""
        with self.turn:
            try:
                if self.process is None or self.process.poll() is not None:
                    self.stop()
                    self.start()
                left = memoryview(json.dumps(request).encode() + b"\n")
                with suppress(BrokenPipeError):  # there will be no reply
                    while left:
                        left = left[self.process.stdin.write(left) :]
                replies = []
                while len(replies) < count:
                    reply = self.replies.readline(REPLY_CAP)
                    if not reply.endswith(b"\n"):
                        return replies, self.stop()
                    replies.append(json.loads(reply))
                return replies, ""
            except BaseException:  # a signal: the next to ask would read these replies
                self.stop()
                raise

    def stop(self) -> str:
        """Ends the process, if it has not ended by itself; says how it did."""
        if self.process is None:
            return ""
        with self.process as process:  # closes its pipes and waits for it
            process.kill()
        self.process = None
        return {
            -signal.SIGPROF: f"more than {SECONDS:g} s of work",
            -signal.SIGALRM: f"more than {LONGEST:g} s",
            template_worker.TOO_LARGE: f"more than {MEMORY >> 20} MiB of memory",
        }.get(process.returncode, f"its process ended with {process.returncode}")

    def forget(self) -> None:
        """For a fork of this process, which would read replies that are not its own."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.returncode = 0  # as it is not the fork's to wait for
        self.__init__()


_renderer = _Renderer()
atexit.register(_renderer.stop)
os.register_at_fork(after_in_child=_renderer.forget)


class ChatTemplate:
    """A template that can be rendered.

    Attributes:
        reads: names that it looks up beside those that it sets itself.

    Args:
        source: the Jinja text.
        where: the file that it comes from, named by every error.
    Raises:
        UserError: jinja2 is missing; the template is too large or not Jinja.
    """

    def __init__(self, source: str, where: str):
        try:
            import jinja2.runtime  # noqa: F401
        except ImportError:
            raise UserError(where, "a chat template needs jinja2", "pip install jinja2") from None
        if len(source) > SOURCE_CAP:
            what = f"a chat template of {len(source):,} characters"
            raise UserError(where, what, f"at most {SOURCE_CAP:,}")
        self.source, self.where = source, where
        self.render([])

    def render(self, asked: list[tuple[list[dict], bool, dict]]) -> list[str | UserError]:
        """Texts of several dialogues at once, which takes less time than one by one.

        Args:
            asked: (messages, add_generation_prompt, what else the template sees by name) each.
        Returns:
            For each its text, or the error: the template refuses the messages, fails, leaves the
            sandbox or writes too much. From one that takes too much time or memory on, all are
            TemplateOverrun.
        """
        # https://reproducible-builds.org/specs/source-date-epoch
        at = os.environ.get("SOURCE_DATE_EPOCH")
        request = [self.source, [[*arguments, at] for arguments in asked]]
        replies, ended = _renderer.ask(request, 1 + len(asked))
        (problem, names), *replies = replies or [(None, [])]
        self.reads = frozenset(names)
        if problem is not None:
            raise UserError(self.where, f"not a chat template: {printable(problem)}", MEND)
        found: list[str | UserError] = []
        for text, fault, dated in replies:
            failed = f"chat template failed: {printable(fault)}"
            found.append(UserError(self.where, failed, MEND) if text is None else text)
            if dated and at is None:
                _tell_of_today()
        if ended:
            overrun = TemplateOverrun(self.where, f"chat template failed: {ended}")
            if not asked:
                raise overrun
            found += [overrun] * (len(asked) - len(found))
        return found


@cache
def _tell_of_today() -> None:
    print("note: the chat template writes today's date: give the first day's as SOURCE_DATE_EPOCH, "
          "in seconds since 1970, to resume on another", file=sys.stderr)


def plain_template(bos: str, eos: str) -> str:
    """A template for models that have none: "role: content" lines, eos after each assistant turn.

    The tokens stand in it as text, so that a tool that knows nothing of ours renders the same.
    """
    return (
        f"{{{{ {json.dumps(bos, ensure_ascii=False)} }}}}"
        "{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}"
        f"{{{{ {json.dumps(eos, ensure_ascii=False)} }}}}"
        "{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
