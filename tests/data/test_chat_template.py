"""Chat templates: rendered as others render them, and ended where they take too much."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers

from minirlhf.data import chat_template
from minirlhf.data.chat_template import SOURCE_CAP, ChatTemplate, TemplateOverrun
from minirlhf.data.examples import load_texts
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from tests.watched import run_cases

HELLO = [{"role": "user", "content": "hello"}]


def render(source, messages=HELLO, **tokens):
    (text,) = ChatTemplate(source, "t").render([(list(messages), True, tokens)])
    if isinstance(text, UserError):
        raise text
    return text


@pytest.fixture
def strict(monkeypatch):
    """Limits that a test need not wait for."""
    chat_template._renderer.stop()
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    monkeypatch.setattr(chat_template, "MEMORY", 256 << 20)
    yield
    chat_template._renderer.stop()


# ---- what is rendered ----------------------------------------------------------------------------


def test_a_template_has_what_transformers_offers(monkeypatch):
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "01"
    assert render("{% generation %}a{{ bos_token }}{% endgeneration %}", bos_token="b") == "ab"
    assert render("{{ range(2) }}{{ 'a'.encode() }}{{ (1, none) }}") == "range(0, 2)b'a'(1, None)"
    assert render("  {% if tools is none %}\nx\n  {% endif %}\n") == "x\n"  # blocks are trimmed
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400000")  # 1000 days after 1970-01-01
    assert render("{{ strftime_now('%Y-%m') }}") == "1972-09"


def test_a_template_that_writes_todays_date_is_told_once(monkeypatch, capsys):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    chat_template._tell_of_today.cache_clear()
    assert [len(render("{{ strftime_now('%Y') }}")) for _ in range(2)] == [4, 4]
    assert capsys.readouterr().err.count("note: the chat template writes today's date: give") == 1


EVERYTHING = (
    "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% if m.role != 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% set ns.last = m['content'] ~ '|' ~ ns.n %}"
    "{{ loop.index0 }}/{{ loop.length }}{{ loop.last }}{{ m.role | upper }}: {{ m.content | trim }}"
    "{% if '<b>' in m.content %}{{ m.content.split('<b>')[-1].strip('\n') }}{% endif %}{% endfor %}"
    "{{ messages[::-1] | map(attribute='role') | join(', ') }}{{ messages[1:] | length }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ ns.last }}"
    "{% macro f(a, b=2) %}{{ a * b }}{{ caller() if caller }}{% endmacro %}{{ f(3) }}"
    "{{ f('x', 3) }}"
    "{% call f(1) %}c{% endcall %}{{ {'a': [1, none, true]} | tojson(indent=2) }}{{ (1, 2) }}"
    "{{ [3, 1, 2] | sort | first }}{{ '%s-%03d' % ('é', 7) }}{{ '{:>4}'.format(5) }}{{ none }}"
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% else %}e{% endfor %}{{ 7 // 2 }}"
    "{% for x in range(9) if x % 2 recursive %}{{ x }}{% endfor %}{{ 2 ** 10 }}{{ 'ab' | list }}"
    "{% set block %}{{ 'in' }}{% endset %}{{ block | replace('i', 'I') }}{{ missing }}{{ -1.5 }}"
    "{% filter upper %}low{% endfilter %}{{ 'x' if messages else 'y' }}{{ 1 < 2 <= 2 }}"
)


def test_a_template_renders_as_jinja2_does():
    sandbox = pytest.importorskip("jinja2.sandbox")
    plain = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": role, "content": f" {role} <b>\n{i} "} for i, role in enumerate("abc")]
    messages.append({"role": "user", "content": "é\U000f0000\ud800"})
    plain.filters["tojson"] = lambda value, indent: json.dumps(value, indent=indent)
    assert render(EVERYTHING, messages) == plain.from_string(EVERYTHING).render(messages=messages)


FAMILIES = dict(
    text.split("\n", 1)
    for text in Path(__file__).with_name("families.jinja").read_text("utf-8").split("#### ")[1:]
)
SPEC = {"type": "object", "required": ["place"], "properties": {
    "place": {"type": "string", "enum": ["a", "b"]},
    "days": {"type": "array", "items": {"type": "integer"}},
    "x": {"type": ["string", "number"], "default": 3},
}}
TOOL = {"type": "function",
        "function": {"name": "heat", "description": "of <é>", "parameters": SPEC}}
CALL = {"type": "function", "id": "abcdefghi",
        "function": {"name": "heat", "arguments": {"place": "Oslo", "n": [1, None]}}}


def turns(*said, **more):
    """Turns of user and assistant in turn; `more` is in each one's message."""
    roles = ["user", "assistant"] * len(said)
    return [{"role": role, "content": text} | more
            for role, text in zip(roles, said, strict=False)]


SYSTEM = {"role": "system", "content": " Be brief.\n/no_think "}
RESULT = {"role": "tool", "content": "20", "tool_call_id": "abcdefghi"}
DIALOGUES = [
    turns("Hi\n  there "),
    [SYSTEM, *turns("a\n\nb", "<think>\nhm\n</think>\n\n yes\n", "<b> é {{ x }}", " no ")],
    [*turns("a"), *turns("b")],
    [*turns("a", "b"), SYSTEM],
    [*turns("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT,
     {"role": "assistant", "content": "It is 20."}],
    *[turns("a", "b", "c", "d", **{name: " hm\n"}) for name in ("reasoning_content", "thinking")],
    turns([{"type": "text", "text": "look "}, {"type": "image"}]),
]


class Day(datetime):
    """1000 days after 1970-01-01, as in SOURCE_DATE_EPOCH=86400000."""

    now = staticmethod(lambda: datetime.fromtimestamp(86400000))


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_templates_is_rendered_as_transformers_does(family, theirs, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400000")
    source, asked, expected = FAMILIES[family], [], []
    for dialogue in DIALOGUES:
        for add, tools in ((True, None), (False, None), (True, [TOOL]), (False, [TOOL])):
            asked.append((dialogue, add, {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}))
            try:
                expected.append(theirs.apply_chat_template(
                    dialogue, tools=tools, chat_template=source, add_generation_prompt=add,
                    tokenize=False,
                ))
            except Exception:  # whatever a template may raise
                expected.append(UserError)
    got = ChatTemplate(source, "t").render(asked)
    assert [UserError if isinstance(text, UserError) else text for text in got] == expected


def test_dialogues_are_rendered_in_their_order():
    template = ChatTemplate("{{ messages[0]['content'] }}{{ bos_token }}", "t")
    asked = [([{"content": str(i)}], False, {"bos_token": "!"}) for i in range(300)]
    asked[7] = ([], False, {})
    texts = template.render(asked)
    assert isinstance(texts[7], UserError)
    assert [text for i, text in enumerate(texts) if i != 7] == [
        f"{i}!" for i in range(300) if i != 7
    ]


def test_a_long_dialogue_has_time_enough():
    turns = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "yes"}]
    template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|' ~ m['role'] ~ '|>' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    )
    assert len(render(template, turns * 500)) == 500 * (8 + 499 + 7 + 13 + 3 + 7)


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = [  # a template, what is told
    ("{% if %}", "not a chat template: Expected an expression, got 'end of statement block'"),
    ("x" * (SOURCE_CAP + 1), "a chat template of 65,537 characters: at most 65,536"),
    ("{{ raise_exception('roles must alternate') }}", "chat template failed: roles must alternate"),
    ("{{ missing.field }}", "chat template failed: 'missing' is undefined"),
    ("{{ 1 + 'a' }}", "chat template failed: unsupported operand"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template failed: access to attribute"),
    ("{{ messages.append(1) }}", "chat template failed: access to attribute 'append'"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "chat template failed: access to attr"),
    ("{{ namespace(x=1) }}", "chat template failed: writes a Namespace as a text"),
    ("{{ messages.index }}", "chat template failed: writes a builtin_function_or_method as a te"),
    ("{{ ''|attr('x') }}", "not a chat template: No filter named 'attr'."),
    ("{{ lipsum() }}", "chat template failed: 'lipsum' is undefined"),
    ("{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}", "chat template failed: more than 1"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template failed: maximum recursion"),
]


@pytest.mark.parametrize(("source", "told"), REFUSED, ids=[told[-20:] for _, told in REFUSED])
def test_a_template_is_refused_in_one_line(source, told):
    with pytest.raises(UserError, match=f"^t: {told}") as error:
        render(source)
    assert "\n" not in str(error.value) and not isinstance(error.value, TemplateOverrun)


def test_templates_need_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.runtime", None)
    with pytest.raises(UserError, match=r"^t: a chat template needs jinja2: pip install"):
        ChatTemplate("{{ 1 }}", "t")


LOOPS = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
OVERRUNS = [
    ("{{ 'a' * 10**10 }}", "memory"),
    ("{{ 10**10 * [0] }}", "memory"),
    ("{{ 'a'.ljust(10**9) }}", "memory"),
    ("{{ '%999999999d' % 1 }}", "memory"),
    ("{{ 9**(9**9) }}", "work"),
    ("{{ 1|round(100000000, 'ceil') }}", "work"),
    ("{{ ('a' * 3000000).encode().decode('punycode') }}", "work"),
    (LOOPS, "work"),
]


@pytest.mark.parametrize(("source", "what"), OVERRUNS, ids=[source for source, _ in OVERRUNS])
def test_a_template_that_takes_too_much_is_ended(source, what, strict):
    told = {"memory": "more than 256 MiB of memory", "work": "more than 0.1 s of work"}[what]
    begun = time.monotonic()
    with pytest.raises(TemplateOverrun, match=f"^t: chat template failed: {told}$"):
        render(source)
    assert time.monotonic() - begun < 30
    assert render("{{ 1 }}") == "1"  # by another process


# ---- what a stranger may try ---------------------------------------------------------------------

START = "{% set ns = namespace(x='ab', y=['c'], t=(1,), n=3) %}{% for i in range(60) %}"
MILLION = "{% set x = 'a' * 1000000 %}"
OFTEN = MILLION + "{% for i in range(100000) %}"
TWINS = START + "{% set ns.x = [ns.x] * 2 %}{% set ns.y = [ns.y] * 2 %}{% endfor %}"
PAYLOADS = [
    # out of the sandbox
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__init__.__globals__ }}", "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(1).x }}", "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{% extends '/etc/passwd' %}",
    "{{ raise_exception.__globals__.os.system('id') }}", "{{ tojson.__globals__ }}",
    "{{ ['{0.__globals__}'.format]|map('attr', '__self__')|list }}",
    # more text than anyone has memory for
    "{{ '{:{}}'.format(1, '999999999') }}", "{{ ('{:999}' * 99999).format(*range(99999)) }}",
    "{{ [1]|tojson(indent=10**9) }}", "{{ [0]|slice(10**9)|list }}", "{{ (1).to_bytes(10**9) }}",
    MILLION + "{{ x.replace('a', x) }}", MILLION + "{{ x|list|join(x) }}",
    "{% set f = '%999d' * 1000000 %}{{ strftime_now(f)|length }}",
    START + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "{% set x %}{% for i in range(20000) %}" + "a" * 5000 + "{% endfor %}{% endset %}{{ x }}",
    # small values that are large when they are written out, compared or hashed
    START + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    START + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    START + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ raise_exception(ns.x) }}",
    START + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1}|length }}",
    START + "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}", TWINS + "{{ ns.x == ns.y }}",
    # more work than anyone has time for
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}",
    OFTEN + "{% set y = x.upper() %}{% endfor %}", "{{ 'a' in range(10**12) }}",
    # no program at all
    "{{ " + "(" * 20000 + ")" * 20000, "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{" * 60000,
    "{{ " + "[" * 500 + "]" * 500 + " }}", "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 5000 + " }}", "{% if %}", "{{ missing.field }}",
]


def test_a_hostile_template_is_rendered_or_refused(tmp_path, strict):
    def make(i):
        return PAYLOADS[i][:200], lambda: render(PAYLOADS[i])

    assert run_cases(range(len(PAYLOADS)), make, tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_imports_nothing_of_the_package():
    maps = Path(f"/proc/{start().pid}/maps").read_text()
    assert "torch" not in maps and "tokenizers" not in maps


# ---- the process ---------------------------------------------------------------------------------


def start():
    assert render("{{ 1 }}") == "1"
    return chat_template._renderer.process


def test_one_process_serves_all_templates():
    assert start().pid == start().pid
    assert render("{{ 2 }}") == "2" and start().poll() is None


def test_a_process_that_was_killed_is_started_again():
    os.kill(start().pid, signal.SIGKILL)
    chat_template._renderer.process.wait()
    assert render("{{ 2 }}") == "2"


def test_a_signal_between_request_and_reply_leaves_no_reply_behind(monkeypatch):
    process = start()

    def interrupted(reply):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_template.json, "loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("{{ 'late' }}")
    assert process.poll() == -signal.SIGKILL
    assert render("{{ 2 }}") == "2"


def test_a_fork_asks_a_process_of_its_own(tmp_path):
    pid = start().pid

    def ask(_):
        assert chat_template._renderer.process is None
        assert render("{{ 2 }}") == "2" and chat_template._renderer.process.pid != pid

    assert run_cases([0], lambda i: ("fork", lambda: ask(i)), tmp_path) == []
    assert start().pid == pid


BUSY = f"""
import signal
from minirlhf.data import chat_template
signal.signal(signal.SIGINT, signal.default_int_handler)
template = chat_template.ChatTemplate("{LOOPS}", "t")
print(chat_template._renderer.process.pid, flush=True)
template.render([([], True, {{}})])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_process_does_not_outlive_who_asks(number):
    asker = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, start_new_session=True)
    with asker:
        pid = int(asker.stdout.readline())
        time.sleep(0.3)
        os.killpg(asker.pid, number)  # as a terminal does
        told = asker.stderr.read().decode()
    assert told.count("Traceback") == (number == signal.SIGINT)  # the asker's own, here
    for _ in range(200):  # a rendering that is under way ends with its time
        if not is_alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_template_that_takes_too_much_ends_the_file_whatever_becomes_of_bad_rows(
    tmp_path, strict
):
    train_tokenizer([], 258, tmp_path / "m")
    bomb = f"{{% if m['content'] == 'bomb' %}}{LOOPS}{{% endif %}}"
    source = f"{{% for m in messages %}}{{{{ m['content'] }}}}{bomb}{{% endfor %}}"
    (tmp_path / "m" / "chat_template.jinja").write_text(source)
    rows = [[{"role": "user", "content": said}, {"role": "assistant", "content": "x"}]
            for said in ("a", "bomb", "b", *["bomb"] * 500)]  # the first is enough
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    match = r"rows.jsonl:2: .*chat_template.jinja\): chat template failed: more than 0.1 s of work"
    with pytest.raises(TemplateOverrun, match=match):
        load_texts(path, load_tokenizer(tmp_path / "m"), None, "drop", RowPolicy(bad_rows="skip"))


def test_a_rendering_lasts_no_longer_than_it_may_whatever_it_waits_for(strict, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 60.0)
    monkeypatch.setattr(chat_template, "LONGEST", 0.2)
    with pytest.raises(TemplateOverrun, match=r"^t: chat template failed: more than 0\.2 s$"):
        render(LOOPS)
