"""Rules that say of a response whether it is right. Values are read by eye: a text, its number."""

import random
from contextlib import suppress
from fractions import Fraction

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.rewards import verifiers
from minirlhf.rewards.load import rule_reward
from minirlhf.rewards.source import Completions
from minirlhf.rewards.verifiers import (
    answer_text,
    exact_reward,
    final_number,
    format_reward,
    length_reward,
    math_reward,
    reference_number,
)

HALF = Fraction(1, 2)
NUMBERS = [  # a text, the number that it ends with
    ("42", 42), ("It is 42.", 42), ("42!", 42), ("42.0", 42), ("42.50", Fraction(85, 2)),
    (".5", HALF), ("007", 7), ("-0", 0), ("so...7", 7), ("(42)", 42), ("**42**", 42), ("$42$", 42),
    ("答案是42。", 42), ('{"answer": 68}', 68),
    # signs: a minus between two numbers, or behind a name, is none
    ("x = -7", -7), ("x = - 7", -7), ("(-7)", -7), ("x=\u22127", -7), ("\u20137", -7), ("+7", 7),
    ("3-5", 5), ("F-16", 16), ("- 7 apples", 7), ("100 - 58", 58), ("(3)-5", 5),
    # what stands around a number
    ("$3", 3), ("-$3", -3), ("$-3", -3), (r"\$42", 42), ("\u20ac5", 5), ("50%", 50), (r"50\%", 50),
    ("5kg", 5), ("5 m^2", 5), ("5 m^{-2}", 5),
    # thousands
    ("1,234.50.", Fraction(2469, 2)), ("1,234,567", 1234567), ("1{,}234", 1234), (r"1\,234", 1234),
    ("1\u202f234", 1234),
    # fractions; a quotient that is a whole number is a computation that was not made
    ("3/4", Fraction(3, 4)), ("6 / 8", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac34", Fraction(-3, 4)), (r"1\tfrac{1}{2}", 3 * HALF),
    ("2 1/2", 5 * HALF), ("2\u00bd", 5 * HALF), ("-\u00bd", -HALF), ("1.5/2", Fraction(3, 4)),
    ("48/2", None), ("48/2 = 24", 24), ("0/5", None), ("1/0", None),
    # powers of ten; no other power is a number
    ("1e3", 1000), ("1.5E-3", Fraction(3, 2000)), ("1.5 \u00d7 10^3", 1500), ("3e5x", 300000),
    (r"1.5 \times 10^{-3}", Fraction(3, 2000)), ("2*10^2", 200), ("2^10", None), ("10^10^9", None),
    ("1e400", 10**400), ("1e401", None), ("1e999999999", None), ("9" * 5000, None),
    # no numbers
    ("", None), ("none", None), ("H2O", None), ("x_2", None), ("12:30", None), ("1.2.3", None),
    ("3/4/2020", None), ("3,5", None), ("1,23", None), ("1,2345", None), ("1_000", None),
    (r"\sqrt{2}", None), (r"\frac{\pi}{2}", None), (r"2\pi", None), ("2 \u03c0", None),
    ("\u0664\u0662", None), ("nan inf", None),
    # several: the last one, or that of the last sentence with the answer
    ("6 * 7 = 42", 42), ("I have 3 cats and 2 dogs", 2), ("1 234", 234),
    ("The answer is 42. I checked it 3 times.", 42), ("Answer: 42\n\nExplanation: 40 + 2", 42),
    ("**Answer:** 42 apples (of 100)", 100), ("The answer to 23 + 45 is 68. As 3 + 5 = 8", 68),
    ("The answer is 41. Wait: the answer is 42. Yes, 2 steps", 42), ("answer = 1,000.5 m", 1000.5),
    ("The answer is 6 * 7 = 42, as 40 and 2.\n5", 2), ("The answer is clear. So 7", 7),
    # where worked answers have it; there a number must stand alone
    ("#### 42", 42), ("a 1\n#### $1,000\n7", 1000), ("#### 3\n#### 42 km\n7", 42), ("#### -7", -7),
    ("#### Step 2: add\n5", 5), ("#### 2. Add\n5", 5), ("#### 3 of 4", None),
    (r"\boxed{42} 7", 42), (r"\boxed{1} \boxed{\frac{3}{4}}", Fraction(3, 4)), (r"\boxed {x=5}", 5),
    (r"\boxed{5\text{ cm}}", 5), (r"\boxed{42", 42), (r"\boxed{(3, 4)} 7", None),
    (r"\boxed{\frac{\pi}{2}}", None), (r"\boxed{} 7", None), (r"\boxed{3!}", 3),
    ("<answer>42</answer> 7", 42), ("<answer> 23 + 45 = 68", 68), ("<answer>3 or 4</answer>", None),
    (r"<answer>\boxed{42}</answer>", 42), ("<answer>x^2</answer> 7", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS, ids=[repr(t[:40]) for t, _ in NUMBERS])
def test_final_number_of_a_text(text, number):
    assert final_number(text) == number


ANSWERS = [
    (18, 18), (18.0, 18), (0.1, HALF / 5), (-1e22, -(10**22)), (10**400, 10**400), ("18", 18),
    (" 18\n", 18), ("$3", 3), ("50%", 50), ("x = -7", -7), ("18 apples", 18), ("3/4", 3 * HALF / 2),
    ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72), (r"As 1 + 1 = 2, \boxed{\frac12}", HALF),
    ("As 2 * 9 = 18, the answer is 18.", 18), ("<answer>7</answer>", 7),
]


@pytest.mark.parametrize(("answer", "number"), ANSWERS)
def test_reference_number_of_a_column(answer, number):
    assert reference_number(answer) == number


@pytest.mark.parametrize(
    "answer",
    [None, "", "  ", [18], {"value": 18}, True, float("nan"), float("inf"), "two", "3 and 4",
     "She sold 24 in May and 72 in all.", "48/2", "x^2", "sqrt(2)", r"\frac{\pi}{2}", "(3, 4)",
     "9" * 5000, "#### none 3 4", "The answer is 3 or 4."],
)
def test_reference_number_refuses_what_is_not_one_number(answer):
    with pytest.raises(ValueError, match=r"^answer is "):
        reference_number(answer)


def test_math_is_strict_of_value_and_tolerant_of_form():
    said = ["42.0", "4.2e1", "The answer is $42.", "43", "", "0.333", "0.5", "1/3"]
    answer = [42, "42", "#### 42", 42, 42, "1/3", "50%", "2/6"]
    assert math_reward(said, answer) == [1, 1, 1, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="answer is missing"):
        math_reward(["4"], [None])
    with pytest.raises(ValueError, match="shorter"):
        math_reward(["4", "5"], [4])


@pytest.mark.parametrize(
    ("text", "answer"),
    [("4", "4"), ("<think>it is 5</think>4", "4"), ("it is 5</think>\n4", "\n4"), ("", ""),
     ("<think>it is 5", ""), ("<think>a</think>4<think>or 5", "4"),
     ("<think>a</think>b</think>4", "4")],
)
def test_answer_text_is_what_is_said_outside_of_reasoning(text, answer):
    assert answer_text(text) == answer
    turns = [{"role": "user", "content": "7"}, {"role": "assistant", "content": text}]
    assert answer_text(turns) == answer_text([*turns, {"role": "tool", "content": "8"}]) == answer


def test_answer_text_of_messages_without_one_is_empty():
    assert answer_text([]) == answer_text([{"role": "user", "content": "4"}]) == ""
    assert answer_text([{"role": "assistant", "content": None}]) == ""


def test_exact_wants_every_character():
    said = ["cat", " cat\n", "Cat", "cat.", "<think>x</think> cat", "", "7", "7.0", "caf\u00e9"]
    answer = ["cat", "cat ", "cat", "cat", "cat", "cat", 7, 7, "cafe\u0301"]
    assert exact_reward(said, answer) == [1, 1, 0, 0, 1, 0, 1, 0, 0]
    for wrong in (None, "", " ", True, ["cat"]):
        with pytest.raises(ValueError, match=r"^answer is "):
            exact_reward(["cat"], [wrong])


def test_format_searches_the_whole_response():
    said = ["<think>a\nb</think> 4", " <think>a</think>4\n", "4", "<think>a</think> 4.", "\u00fc\0"]
    pattern = r"^<think>.*</think>\s*[0-9]+$"
    assert format_reward(said, pattern) == [1, 1, 0, 0, 0]
    assert format_reward(said, "[0-9]") == [1, 1, 1, 1, 0]
    assert format_reward([[{"role": "assistant", "content": "4"}]], "^4$") == [1]
    assert format_reward(["", "\ud83d"], "^$") == [1, 0] and format_reward([], "a") == []


def test_a_search_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(verifiers, "SECONDS", 1)
    said = ["b", "a" * 40 + "b", "c"]
    batch = Completions(["p"] * 3, [[1]] * 3, said, [[2]] * 3, ["eos"] * 3, {})
    with pytest.raises(UserError) as caught:
        rule_reward("format:^(a+)+$")(batch)
    told = "--reward format:^(a+)+$: takes more than 1 s of processor time at response 1: 'aaa"
    assert str(caught.value).startswith(told)


def test_length_falls_to_both_sides_of_its_target():
    ids = [[], [5], [5, 0], [5] * 4, [5] * 4 + [0], [5] * 6, [5] * 8, [5] * 9]
    reasons = ["length", "stop", "eos", "stop", "eos", "length", "length", "length"]
    # n = 0 1 1 4 4 6 8 9, N = 4: 1 - |n - 4| / 4, at least 0
    assert length_reward(ids, reasons, 4) == [0, 0.25, 0.25, 1, 1, 0.5, 0, 0]


BATCH = Completions(
    prompts=["p", [{"role": "user", "content": "q"}]], prompt_ids=[[1], [2]],
    completions=["So 4", "5"], response_ids=[[7, 8, 0], [9]], finish_reasons=["eos", "length"],
    columns={"answer": [4, "#### 5"], "pattern": ["x", "y"], "target": [1, 1]},
)


@pytest.mark.parametrize(
    ("rule", "scores"),
    [("math", [1, 1]), ("exact", [0, 0]), ("format:^[0-9]$", [0, 1]), ("format:So|5", [1, 1]),
     ("length:2", [1, 0.5])],
)
def test_a_rule_is_a_reward_source(rule, scores):
    found = rule_reward(rule)(BATCH)
    assert found.tolist() == scores and found.dtype == torch.float32
    assert rule_reward(rule)(BATCH._replace(completions=["", ""])).shape == (2,)


def test_a_rule_without_answers_says_so():
    with pytest.raises(UserError, match=r"^--reward math: answer is missing$"):
        rule_reward("math")(BATCH._replace(columns={}))


PIECES = [  # of which texts are put together
    *"0 1 12 345 000 , . - \u2212 + $ % / = ( ) { } [ ] ^ _ e E x \u00d7 \u03c0 10^ ! : is".split(),
    r"\times", r"\frac", r"\boxed{", r"\text{", r"\,", "{,}", "<answer>", "</answer>", "####",
    "answer", "\u00bd", "\u2150", "\u202f", "\u0664", "\u2044", "\ud800", "\0", " ", "\n", "9" * 50,
]


def test_what_a_reference_is_read_as_a_response_is_too():
    rng, read = random.Random(0), 0
    for _ in range(4000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 12)))
        found = final_number(text)
        assert found is None or isinstance(found, Fraction)
        with suppress(ValueError):  # it is no reference
            assert reference_number(text) == found, text
            read += 1
    assert read > 100


def test_no_text_takes_long():
    """Each of these makes a pattern with nested repeats take minutes or for ever."""
    n = 5_000
    for piece in ("9", "1,", "1,111", "answer ", "answer is ", r"\boxed{", "{", "<answer>", "<",
                  "####", "#### ", "-", "1/", "1 ", "1e", ".", r"\frac{1", r"\frac{1}", "x10^",
                  " ", "1 1/1 ", "\u00bd", "*", r"\text{", "=-", "answer is.", "$", "answer:\n"):
        many = piece * n
        for text in (many, f"#### {many}", rf"\boxed{{1{many}", f"answer {many}"):
            found = final_number(text)
            assert found is None or isinstance(found, Fraction)

