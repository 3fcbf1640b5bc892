"""Chat templates: a model's own Jinja program, rendered as transformers renders it, in a sandbox.

A template comes with downloaded weights, so it is a stranger's code: it runs in jinja2's immutable
sandbox, and its size, its loops and its output are capped.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from minirlhf.errors import UserError, printable

SIZE_CAP = 1 << 20  # characters: of the template, of what it renders, of one repeated string
LOOP_CAP = 1_000_000  # numbers that one rendering may draw from range()


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


def _environment():
    """transformers' environment: same filters, globals and tags, so the same text comes out."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote; it renders as its own body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
                raise SecurityError("a power of huge numbers")
            if operator == "*":
                for text, count in ((left, right), (right, left)):
                    if hasattr(text, "__len__") and len(text) * count > SIZE_CAP:
                        raise SecurityError("a repeated text of more than 1 MiB")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    def strftime_now(form):
        # https://reproducible-builds.org/specs/source-date-epoch: a run that is resumed on another
        # day can be given the first day's date.
        return datetime.fromtimestamp(
            int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
        ).strftime(form)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def _counted_range(refuse: type[Exception]) -> Callable[..., range]:
    drawn = 0

    def counted(*bounds: int) -> range:
        nonlocal drawn
        made = range(*bounds)
        drawn += len(made)
        if drawn > LOOP_CAP:
            raise refuse(f"loops of more than {LOOP_CAP:,} steps")
        return made

    return counted


def compile_template(source: str, where: str) -> Callable[[list[dict], bool, dict], str]:
    """The function render(messages, add_generation_prompt, special_tokens) -> text of a template.

    Args:
        source: the Jinja text.
        where: the file that it comes from, named by every error.
    Raises:
        UserError: jinja2 is missing; the template is larger than 1 MiB or not Jinja; later, from
            the function: it refuses the messages, fails, leaves the sandbox or writes over 1 MiB.
    """
    try:
        import jinja2
        from jinja2.exceptions import SecurityError
    except ImportError:
        raise UserError(where, "a chat template needs jinja2", "pip install jinja2") from None
    if len(source) > SIZE_CAP:
        raise UserError(where, f"a chat template of {len(source):,} characters", "at most 1 MiB")
    try:
        template = _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(where, f"not a chat template: {printable(error)}") from None

    def render(messages: list[dict], add_generation_prompt: bool, special_tokens: dict) -> str:
        pieces, size = [], 0
        try:
            for piece in template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, range=_counted_range(SecurityError), **special_tokens,
            ):  # fmt: skip
                pieces.append(piece)
                size += len(piece)
                if size > SIZE_CAP:
                    raise SecurityError("more than 1 MiB of text")
        # A template is a program: what it may raise is as wide as what Python may raise.
        except Exception as error:
            raise UserError(where, f"chat template failed: {printable(error)}") from None
        return "".join(pieces)

    return render


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)


def swap_names(messages: list, names: re.Pattern) -> tuple[list, dict[str, str]]:
    """Puts one private-use character in place of each special token's name in the messages.

    Once a template has put its own tokens around them, nobody can tell theirs from its own.

    Args:
        messages: messages, or lists of messages that will be rendered together.
        names: matches any special token's name.
    Returns:
        (messages, {character: name}); no character of it stood in the messages before.
    """
    text = "\0".join(_strings(messages))
    found = dict.fromkeys(names.findall(text))
    if not found:
        return messages, {}
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    character = dict(zip(found, free, strict=False))

    def swap(value: object) -> object:
        if isinstance(value, str):
            return names.sub(lambda match: character[match[0]], value)
        if isinstance(value, dict):
            return {key: swap(child) for key, child in value.items()}
        return [swap(child) for child in value] if isinstance(value, list) else value

    return swap(messages), {mark: name for name, mark in character.items()}
