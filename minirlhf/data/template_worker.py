"""The process that renders chat templates, so that one which never ends can be ended.

`chat_template` starts this file by its path, with nothing of the package imported, and asks it over
pipes. A request is a line of JSON, [template, [arguments of `render`, ...]]. The replies are a line
each: [null or why it is no template, the names that it reads]; then for each rendering [text or
null, what is wrong or null, whether the template wrote the date].

The kernel ends a rendering that takes too long, even where Python does not look at signals. One
that takes too much memory leaves with TOO_LARGE. The process ends by itself when its asker does.
"""

import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from functools import lru_cache, partial

TEXT_CAP = 1 << 20  # characters that a template renders
TOO_LARGE = 3  # exit code


class Refused(Exception):
    """A template failed, or did what none may do."""


def make_environment():
    """transformers' environment: same filters, globals and tags, so the same text comes out."""
    from jinja2 import nodes, utils
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Namespace(utils.Namespace):
        """No name that Python may ask an object for by itself."""

        def __init__(self, /, *pairs, **values):
            super().__init__()
            for name, value in dict(*pairs, **values).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise Refused(f"stores {name} in a namespace")
            super().__setitem__(name, value)

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote; it renders as its own body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def plain(value):
        """Other objects have no text but their address, which differs from run to run."""
        if not isinstance(value, Collection | int | float | Undefined | None):
            raise Refused(f"writes a {type(value).__name__} as a text")
        return value

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=plain
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    # `attr` led out of the sandbox of older jinja2; `random` and lorem ipsum have no seed.
    del made.filters["attr"], made.filters["random"], made.globals["lipsum"]
    return made


def compile_template(environment, source: str):
    """(the template, the names that it reads, of what it is not given by itself)."""
    from jinja2 import meta

    template = environment.from_string(source)
    return template, sorted(meta.find_undeclared_variables(environment.parse(source)))


REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


def with_reasoning(message: dict) -> dict:
    """The message, its reasoning under the names that templates read, as transformers shows it."""
    found = [message[name] for name in REASONING if message.get(name) is not None]
    if not found:
        return message
    return {"thinking": found[0]} | message | {"reasoning_content": found[0]}


def render(template, messages: list, add_generation_prompt: bool, names: dict, at: str | None):
    """(the text, whether the template wrote the date).

    Args:
        names: what else the template sees by name.
        at: the time, in seconds since 1970; None: now.
    """
    dated = False

    def strftime_now(form):
        nonlocal dated
        dated = True
        return datetime.fromtimestamp(time.time() if at is None else int(at)).strftime(form)

    pieces, size = [], 0
    seen = {"tools": None, "documents": None, "strftime_now": strftime_now} | names
    seen["messages"] = [with_reasoning(message) for message in messages]
    seen["add_generation_prompt"] = add_generation_prompt
    for piece in template.generate(seen):
        pieces.append(piece)
        size += len(piece)
        if size > TEXT_CAP:
            raise Refused("more than 1 MiB of text")
    return "".join(pieces), dated


def timed(limits: tuple[float, float], function: Callable, *arguments: object) -> object:
    """Calls what a template has a say in; the kernel ends this process where it takes too long.

    Args:
        limits: seconds of work, and in all, whoever else uses the processor.
    Raises:
        Refused: with what it raised: a program may raise whatever Python may raise.
    """
    signal.setitimer(signal.ITIMER_PROF, limits[0])
    signal.setitimer(signal.ITIMER_REAL, limits[1])
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except Exception as error:
        raise Refused(str(error)[:1000]) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def replies(compiled: Callable, limits: tuple, source: str, asked: list) -> Iterator[object]:
    """The replies to one request."""
    try:
        template, names = timed(limits, compiled, source)
    except Refused as refused:
        yield str(refused), []
        yield from [None] * len(asked)
        return
    yield None, names
    for arguments in asked:
        try:
            text, dated = timed(limits, render, template, *arguments)
            yield text, None, dated
        except Refused as refused:
            yield None, str(refused), False


def main(seconds: float, longest: float, memory: int) -> int:
    """Answers requests until there are no more."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPROF, signal.SIGALRM):  # whatever the asker does about its own
        signal.signal(number, signal.SIG_DFL)
    compiled = lru_cache(8)(partial(compile_template, make_environment()))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    if sys.platform != "darwin":  # which does not enforce it: there only time is limited
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        for line in sys.stdin.buffer:
            for reply in replies(compiled, (seconds, longest), *json.loads(line)):
                sys.stdout.write(json.dumps(reply) + "\n")
                sys.stdout.flush()
    except MemoryError:
        return TOO_LARGE
    return 0


if __name__ == "__main__":
    sys.path += sys.argv[4:]  # where jinja2 is
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
