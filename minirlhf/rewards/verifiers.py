"""Rewards that can be verified: a rule says of each response whether it is right, no model does.

    math          1 where the response's final number equals that of the column `answer`, else 0
    exact         1 where the response is the column `answer`, blanks at both ends aside, else 0
    format:REGEX  1 where re.search finds REGEX in the response, blanks at both ends aside, else 0
    length:N      max(0, 1 - |n - N| / N) of a response of n tokens, its eos not counted

The final number (`final_number`) is searched for in the text behind a reasoning block. It is the
one in the last \\boxed{...}, else in the last <answer>...</answer>, else on the line of the last
"####"; a text that has such a place and no single number there has no final number. Else it is the
last number of the last sentence with "answer is" or "answer:", else the last number of the text.

Numbers are compared as fractions, without any tolerance: 42 = 42.0 = 4.2e1 and 3/4 = 0.75, but
0.333 is not 1/3. A currency, a unit and a percent sign are no part of the value: 50% equals 50. A
quotient that is a whole number, as 48/2, is a computation that was not made, and no number.

A pattern is the user's, what it meets is the model's: it runs in a process of its own, which may
take SECONDS of processor time a batch.
"""

import json
import re
import subprocess
import sys
import unicodedata
from fractions import Fraction
from math import isfinite
from pathlib import Path

from minirlhf.errors import printable

SECONDS = 5  # of processor time, for one pattern and all responses of a batch
LONGEST = 400  # characters of a number, and the largest exponent of ten that is read

Completion = str | list[dict[str, str]]  # a text, or messages, as in TRL


# --------------------------------------------------------------------------------- the four rewards


def math_reward(completions: list[Completion], answer: list) -> list[float]:
    """1.0 where a response's final number equals its answer's, else 0.0.

    Args:
        answer: numbers, or texts that `reference_number` reads.
    Raises:
        ValueError: an answer is not one number.

    >>> math_reward(["6 * 7 = 42.0", "It is 0.333."], ["#### 42", "1/3"])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(final_number(answer_text(said)) == reference_number(a)) for said, a in pairs]


def exact_reward(completions: list[Completion], answer: list) -> list[float]:
    """1.0 where a response is its answer, character for character, else 0.0. What stands before the
    end of a reasoning block, and blanks at both ends, do not count.

    Raises:
        ValueError: an answer is no text and no number, or empty.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(answer_text(said).strip() == reference_text(a)) for said, a in pairs]


def format_reward(completions: list[Completion], pattern: str) -> list[float]:
    """1.0 where re.search finds the pattern in a response, else 0.0. The dot matches line ends too;
    ^ and $ are the ends of the response, whose reasoning block counts.

    Raises:
        TimeoutError: it takes more than SECONDS of processor time.
    """
    texts = [spoken(completion).strip() for completion in completions]
    worker = str(Path(__file__).with_name("regex_worker.py"))
    made = subprocess.run(
        [sys.executable, "-I", "-S", worker, str(SECONDS)], check=False, capture_output=True,
        text=True, input=json.dumps([pattern, texts]), encoding="ascii",
    )
    found = made.stdout.splitlines()
    if made.returncode:
        at = f"response {len(found)}: {printable(repr(texts[len(found)]), 80)}"
        raise TimeoutError(f"takes more than {SECONDS} s of processor time at {at}")
    return [float(line) for line in found]


def length_reward(
    completion_ids: list[list[int]], finish_reasons: list[str], target: int
) -> list[float]:
    """max(0, 1 - |n - N| / N) of responses of n tokens, eos not counted: as in L1-Exact (Aggarwal
    and Welleck 2025, arXiv:2503.04697), but relative to the wanted length N, and from 0 to 1.

    >>> length_reward([[5, 6, 7, 0], [5], [5, 6, 7, 8]], ["eos", "length", "stop"], 2)
    [0.5, 0.5, 0.0]
    """
    counts = [len(ids) - (reason == "eos")
              for ids, reason in zip(completion_ids, finish_reasons, strict=True)]
    return [max(0.0, 1 - abs(n - target) / target) for n in counts]


# ----------------------------------------------------------------------------- what a response says


def spoken(completion: Completion) -> str:
    """Its text; of messages, the last one of the assistant."""
    if isinstance(completion, str):
        return completion
    said = [turn.get("content") for turn in completion if turn.get("role") == "assistant"]
    return said[-1] if said and isinstance(said[-1], str) else ""


def answer_text(completion: Completion) -> str:
    """What is said outside of reasoning: behind the last </think>, before a <think> that does not
    end. Where the prompt ended with <think>, a response without </think> is taken for an answer."""
    return spoken(completion).rpartition("</think>")[2].partition("<think>")[0]


def reference_text(answer: object) -> str:
    """The text that `exact` wants.

    Raises:
        ValueError: there is none.
    """
    if answer is None:
        raise ValueError("answer is missing")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"answer is {printable(repr(answer), 80)}: needs a text or a number")
    if not (text := str(answer).strip()):
        raise ValueError("answer is empty")
    return text


# --------------------------------------------------------------------------------- reading a number

# Other spellings of a sign, a separator of thousands or a command, and ours.
_SPELLINGS = {
    "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u00a0": " ", "\u2009": ",",
    "\u202f": ",", "{,}": ",", r"\,": ",", r"\!": "", r"\$": "$", r"\%": "%", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
}
_VULGAR = "[\u00bc-\u00be\u2150-\u215e]"  # one half and its like, each one character
_FRAC = re.compile(
    r"\\frac ?(?:\{ ?(-?[0-9.,]++) ?\}|([0-9])) ?(?:\{ ?([0-9.,]++) ?\}|([0-9]))"
)
_TIMES_TEN = re.compile(r" ?(?:\\times|\\cdot|[*x\u00d7\u00b7]) ?10 ?\^ ?\{?([+-]?[0-9]++)\}?")
_MONEY = "$\u20ac\u00a3\u00a5"
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+|(?<!\.)\.[0-9]++)"
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z0-9_^{{]) (?<![0-9][.,:/]) (?<!{{-)  # in no name, power, version, time or date
    (?P<sign> (?<![)\]}}%]) - (?=[{_MONEY}.0-9]) | (?: (?<=[=(]) | (?<=[=(][ ]) ) -[ ] )?+
    [{_MONEY}]?+
    (?: (?P<whole>[0-9]++) [ ] (?=[0-9]++/[0-9]) )?+  # of a mixed number
    (?P<above> {_DIGITS} (?:[eE][+-]?[0-9]++)?+ )
    (?: [ ]?/[ ]? (?P<below>{_DIGITS}) )?+
    (?! [0-9_] | [.,:/][0-9] | [ ]?\^ | [ ]?\\(?:pi|sqrt) | [ ]?[\u03c0\u221a] )
    """,
    re.VERBOSE,
)
_PLACES = (  # where a worked answer has its number
    re.compile(r"\\boxed ?\{((?:[^{}]++|\{[^{}]*+\})*+)"),
    re.compile(r"<answer>((?:[^<]++|<(?!/answer>))*+)"),
    re.compile(rf"#### *+(?=[-+.{_MONEY}]*+[0-9])(?![0-9]++[.)] )(.*)"),  # no heading
)
_SENTENCE = re.compile(
    r"\banswer\b[^\n]{0,100}?(?:\bis\b|[:=])[\s*]*+((?:[^\n.!?]++|[.!?](?![\s*]|$))*+)", re.I
)
_UNIT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox) ?\{[^{}]*+\}")
_HARMLESS = re.compile(rf"[^\W\d_]*|[\s=:.,;!?{_MONEY}%\u00b0'\"*{{}}]")  # around a number


def final_number(text: str) -> Fraction | None:
    """The number that a worked answer ends with; None where there is none that can be read.

    >>> final_number("It costs $1,234.50 in all."), final_number("10^10^9")
    (Fraction(2469, 2), None)
    """
    text = _plain(text)
    if (place := _place(text)) is not None:
        return _one_number(place)
    for sentence in reversed(_SENTENCE.findall(text)):
        if found := [*_NUMBER.finditer(sentence)]:
            return _value(found[-1])
    found = [*_NUMBER.finditer(text)]
    return _value(found[-1]) if found else None


def reference_number(answer: object) -> Fraction:
    """The number of a column `answer`: a number, or a text with one number alone, or a worked
    solution that ends with "#### 18", \\boxed{18} or a sentence with "answer is 18".

    Raises:
        ValueError: it is not exactly one number.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        return Fraction(answer)
    if isinstance(answer, float) and isfinite(answer):
        return Fraction(str(answer))  # the decimal number that was written
    text = _plain(reference_text(answer))
    if (place := _place(text)) is None:
        place = (_SENTENCE.findall(text) or [text])[-1]
    if (number := _one_number(place)) is None:
        shown = printable(repr(answer), 80)
        raise ValueError(f"answer is {shown}: needs one number, behind #### in a worked solution")
    return number


def _plain(text: str) -> str:
    """The text with one spelling for each sign, separator, fraction and power of ten."""
    for spelling, ours in _SPELLINGS.items():
        text = text.replace(spelling, ours)
    text = re.sub(rf"(?<=[0-9])(?=\\frac|{_VULGAR})", " ", text)  # of a mixed number
    text = re.sub(f"{_VULGAR}+", lambda c: unicodedata.normalize("NFKC", c[0]), text)
    text = text.replace("\u2044", "/")
    return _TIMES_TEN.sub(r"e\1", _FRAC.sub(r"\1\2/\3\4", text))


def _place(text: str) -> str | None:
    """What stands where a worked answer has its number; None where the text has no such place."""
    found = (place.findall(text) for place in _PLACES)
    return next((places[-1] for places in found if places), None)


def _one_number(text: str) -> Fraction | None:
    """The number behind the last "=", where nothing that could change its value is beside it."""
    text = _UNIT_COMMAND.sub("", text.rpartition("=")[2])
    found = [*_NUMBER.finditer(text)]
    if len(found) != 1:
        return None
    around = text[: found[0].start()] + text[found[0].end() :]
    return None if _HARMLESS.sub("", around) else _value(found[0])


def _value(found: re.Match) -> Fraction | None:
    """None where it has no value, is too long to be meant, or is a quotient left undone."""
    sign, whole, above, below = (text and text.replace(",", "") for text in found.groups())
    exponent = re.split("[eE]", above)[1:]
    if len(found[0]) > LONGEST or (exponent and not -LONGEST <= int(exponent[0]) <= LONGEST):
        return None
    value = Fraction(above)
    if below is not None:
        if not (under := Fraction(below)) or (value / under).denominator == 1:
            return None
        value = value / under + int(whole or 0)
    return -value if sign else value
