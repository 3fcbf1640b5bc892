"""Chat templates: a model's own Jinja program, rendered as transformers renders it, in a sandbox.

A template comes with downloaded weights, so it is a stranger's code. jinja2's immutable sandbox
keeps it from the machine; a meter keeps it from taking all time and memory: each pass of a loop,
each call and each character that an operation reads or makes costs steps, and those run out.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from functools import cache, wraps

from minirlhf.errors import UserError, printable

SOURCE_CAP = 1 << 16  # characters of a template; those in use have some 20,000 at most
SIZE_CAP = 1 << 20  # characters that it renders
GROWTH_CAP = 1 << 25  # characters that one operation may make of what it is given
DEPTH_CAP = 64  # levels of a value
STEP_CAP = 1_000_000  # of one rendering; a long dialogue takes some 10,000
CALL = 16  # steps of a call: as much work as some nodes of a template
# Filters that look at containers without reading all that is in them, and tests that do read it.
SHALLOW = frozenset((
    "length", "count", "first", "last", "list", "default", "d", "items", "map", "select", "reject",
    "selectattr", "rejectattr", "batch", "slice", "reverse", "abs", "int", "float", "round",
))
DEEP_TESTS = frozenset((
    "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">",
    "ge", ">=", "in", "lower", "upper",
))
# Filters and methods whose result may be larger than all that they are given.
GROWING = frozenset((
    "batch", "slice", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "replace",
    "join", "tojson", "format", "format_map", "translate", "to_bytes", "hex",
))
# `attr` led out of the sandbox of older jinja2, `random` has no seed, and the time that the others
# take grows faster than the text they read.
DROPPED = ("attr", "random", "pprint", "sum", "striptags", "urlize", "wordwrap", "xmlattr")
WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*([0-9]{4}|\*)|\{[^{}]*([0-9]{4}|\{)")  # {:9999}, {:{}}


class _Refused(Exception):
    """A template asks for more than it may have."""


class _Meter:
    """Counts the work of one rendering in steps of well under a microsecond each.

    Args:
        plain: types without inner values, beside numbers; any other object has no text here.
    """

    def __init__(self, plain: tuple[type, ...]):
        self.plain, self.spent = plain, 0

    def spend(self, steps: int) -> None:
        self.spent += max(steps, 1)
        if self.spent > STEP_CAP:
            raise _Refused(f"more than {STEP_CAP:,} steps of work")

    def glance(self, value: object) -> object:
        """Pays for making a value, but not for what stands inside it: that was paid for before."""
        if isinstance(value, tuple):  # hashed with all that is in them
            self.weigh(value)
        elif isinstance(value, int):
            if value.bit_length() > 4096:
                raise _Refused("an integer of thousands of digits")
        else:
            self.spend(1 + len(value) // 16 if isinstance(value, Collection) else 1)
        return value

    def weigh(self, value: object) -> int:
        """Pays for reading all of a value, shared parts as often as they stand in it."""
        before, stack = self.spent, [(value, 1)]
        while stack:
            node, depth = stack.pop()
            if isinstance(node, str | bytes | int):
                self.glance(node)
            elif isinstance(node, Collection):
                if depth > DEPTH_CAP:
                    raise _Refused(f"a value nested deeper than {DEPTH_CAP} levels")
                self.spend(depth * (1 + len(node)))  # an indented text repeats the depth
                stack += [(child, depth + 1) for child in node]
                if isinstance(node, dict):
                    stack += [(child, depth + 1) for child in node.values()]
            elif not isinstance(node, self.plain):
                raise _Refused(f"reads a {type(node).__name__} as a text")
        return self.spent - before

    def limit_growth(self, operands: list, formats: bool) -> None:
        """Refuses before it is made what could be as large as the product of two operands.

        Args:
            formats: the first operand is a format, and may ask for widths of three digits.
        """
        if formats and isinstance(operands[0], str) and WIDE.search(operands[0]):
            raise _Refused("a width of thousands, or one that is formatted itself")
        sizes = [1000 if formats else 0]
        sizes += [len(v) if isinstance(v, str | bytes)
                 else abs(v) if isinstance(v, int) else 16 * self.weigh(v)
                 for v in operands]
        largest = max(sizes)
        if largest * (1 + sum(sizes) - largest) > GROWTH_CAP:
            raise _Refused(f"a value of more than {GROWTH_CAP:,} characters")

    def metered(self, name: str, function: Callable, deep: bool) -> Callable:
        """A filter or test of jinja2 that pays for what it reads and makes."""
        read = self.weigh if deep else self.glance
        first = int(hasattr(function, "jinja_pass_arg"))  # jinja2's own object comes before

        @wraps(function)
        def paid(*given: object, **named: object) -> object:
            values = [*given[first:], *named.values()]
            self.spend(CALL)
            if name in GROWING:
                self.limit_growth(values, name == "format")
            for value in values:
                read(value)
            made = function(*given, **named)
            return self.glance(list(made) if isinstance(made, Iterator) else made)

        return paid


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


def _sandbox(meter: _Meter):
    """jinja2's immutable sandbox, where operators and calls pay as well."""
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

        def call_binop(self, context, operator, left, right):
            if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
                raise _Refused("a power of huge numbers")
            if operator == "%" and isinstance(left, bytes):
                raise _Refused("formatted bytes")
            if operator in ("*", "%") and any(isinstance(v, Collection) for v in (left, right)):
                meter.limit_growth([left, right], operator == "%")
            return meter.glance(super().call_binop(context, operator, left, right))

        def call(self, context, obj, *given, **named):
            values = [*given, *named.values()]
            method = getattr(obj, "__wrapped__", obj)  # `format` comes in a guard of jinja2's
            receiver, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            if name in GROWING:
                meter.limit_growth([receiver, *values], name.startswith("format"))
            elif isinstance(receiver, str | bytes | dict):
                meter.glance(receiver)
            elif isinstance(receiver, Collection):  # `index` and `count` compare
                meter.weigh(receiver)
            meter.spend(CALL)
            if not isinstance(obj, Macro):
                meter.weigh(values)
            return meter.glance(super().call(context, obj, *given, **named))

        def getitem(self, obj, argument):
            if not isinstance(argument, slice):  # hashed, and shown where there is no such item
                meter.weigh(argument)
            return super().getitem(obj, argument)

    return Sandbox


def _metered_nodes(tree, environment):
    """The syntax tree of a template with a price on what no hook of jinja2's sees."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def priced(name, node, *arguments):
        return nodes.Filter(node, name, [nodes.Const(a) for a in arguments], [], None, None,
                            lineno=node.lineno)

    class Price(NodeTransformer):
        def body(self, node):
            """A loop's pass, a macro's or block's call: as many steps as there are nodes in it."""
            texts = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            steps = sum(1 for _ in node.find_all(nodes.Node)) + texts // 16
            self.generic_visit(node)
            none = nodes.Const(None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(priced(" spend", none, steps), lineno=node.lineno))
            if getattr(node, "test", None) is not None:
                node.test = priced(" spend", node.test, steps)
            return node

        visit_For = visit_Macro = visit_CallBlock = visit_Block = body

        def visit_Concat(self, node):
            self.generic_visit(node)
            return priced(" concat", nodes.List(node.nodes, lineno=node.lineno))

        def visit_Compare(self, node):
            self.generic_visit(node)
            for side in (node, *node.ops):
                if not isinstance(side.expr, nodes.Const):
                    side.expr = priced(" weigh", side.expr)
            return node

        def visit_Getitem(self, node):
            self.generic_visit(node)
            return priced(" glance", node) if isinstance(node.arg, nodes.Slice) else node

        def visit_Tuple(self, node):
            self.generic_visit(node)
            return priced(" glance", node) if node.ctx == "load" else node

    return Price().visit(tree).set_environment(environment)


@cache
def _tell_of_today() -> None:
    print("note: the chat template writes today's date: give the first day's as SOURCE_DATE_EPOCH, "
          "in seconds since 1970, to resume on another", file=sys.stderr)


def _environment(meter: _Meter):
    """transformers' environment: same filters, globals and tags, so the same text comes out."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols

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

    def strftime_now(form):
        # https://reproducible-builds.org/specs/source-date-epoch
        at = os.environ.get("SOURCE_DATE_EPOCH")
        if at is None:
            _tell_of_today()
        return datetime.fromtimestamp(int(time.time() if at is None else at)).strftime(form)

    def read(value):
        meter.weigh(value)
        return value

    def spend(value, steps):
        meter.spend(steps)
        return value

    made = _sandbox(meter)(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=read,
        optimized=False,  # it would pay for constants once, when it compiles
    )
    made.filters["tojson"] = tojson
    for name in DROPPED:
        del made.filters[name]
    for name, function in made.filters.items():
        made.filters[name] = meter.metered(name, function, name not in SHALLOW)
    for name, function in made.tests.items():
        made.tests[name] = meter.metered(name, function, name in DEEP_TESTS)
    # Names with a blank: no template can write them.
    made.filters |= {" spend": spend, " weigh": read, " glance": meter.glance}
    made.filters[" concat"] = lambda pieces: "".join(map(str, (read(p) for p in pieces)))
    made.globals |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now,
        "range": lambda *bounds: meter.glance(range(*bounds)),
    }
    del made.globals["lipsum"]
    return made


def compile_template(source: str, where: str) -> Callable[[list[dict], bool, dict], str]:
    """The function render(messages, add_generation_prompt, special_tokens) -> text of a template.

    Args:
        source: the Jinja text.
        where: the file that it comes from, named by every error.
    Raises:
        UserError: jinja2 is missing; the template is too large or not Jinja; later, from the
            function: it refuses the messages, fails, leaves the sandbox, works or writes too much.
    """
    try:
        from jinja2.runtime import Undefined
    except ImportError:
        raise UserError(where, "a chat template needs jinja2", "pip install jinja2") from None
    if len(source) > SOURCE_CAP:
        what = f"a chat template of {len(source):,} characters"
        raise UserError(where, what, f"at most {SOURCE_CAP:,}")
    meter = _Meter((type(None), float, Undefined))
    # A template is a program: what it may raise is as wide as what Python may raise.
    try:
        environment = _environment(meter)
        tree = _metered_nodes(environment.parse(source), environment)
        template = environment.from_string(tree)
    except Exception as error:
        raise UserError(where, f"not a chat template: {printable(error)}") from None

    def render(messages: list[dict], add_generation_prompt: bool, special_tokens: dict) -> str:
        pieces, size, meter.spent = [], 0, 0
        try:
            for piece in template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **special_tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > SIZE_CAP:
                    raise _Refused("more than 1 MiB of text")
        except Exception as error:
            raise UserError(where, f"chat template failed: {printable(error)}") from None
        return "".join(pieces)

    return render


def _strings(value: object) -> Iterator[str]:
    """Every string of messages, keys too: a template may write those of a tool's arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def unused_character(messages: list) -> str:
    """A private-use character that stands nowhere in the messages."""
    text = "\0".join(_strings(messages))
    return next(chr(code) for code in range(0x10FFFD, 0xF0000, -1) if chr(code) not in text)


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
            return {swap(key): swap(child) for key, child in value.items()}
        return [swap(child) for child in value] if isinstance(value, list) else value

    def swap_messages(value: object) -> object:
        """A message's own keys, as role and content, are for the template to know."""
        if isinstance(value, dict):
            return {key: swap(child) for key, child in value.items()}
        return [swap_messages(child) for child in value]

    return swap_messages(messages), {mark: name for name, mark in character.items()}
