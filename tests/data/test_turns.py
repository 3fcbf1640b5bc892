"""Dialogues of which every turn of the assistant is learned. One token a byte, so that ids are
spelled by hand; transformers' mask of {% generation %} is the other side."""

import json
import shutil

import pytest

from minirlhf.data.examples import load_texts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from tests.data.conftest import EOS, spell


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(text):
    """The stretches of ids that are learned."""
    behind, at, found = text.ids[text.prompt_length :], 0, []
    for first, end in (*text.gaps, (len(behind), len(behind))):
        found.append(behind[at:first])
        at = end
    return found


def load(write, tokenizer, *rows, train_on="all", most=None, overlong="drop", **policy):
    texts, report = load_texts(
        write(*rows), tokenizer, most, overlong, RowPolicy(**policy), train_on=train_on
    )
    return texts, report


FOUR = turns("q", "A", "r", "B")
# The plain template writes "role: content" lines, eos behind an answer.
HEAD, BETWEEN = "user: q\nassistant:", "\nuser: r\nassistant:"


def test_each_turn_of_the_assistant_is_learned_with_its_eos(write, tokenizer):
    (text,), report = load(write, tokenizer, {"messages": FOUR})
    assert text.ids == [
        *spell(HEAD), *spell(" A"), EOS, *spell(BETWEEN), *spell(" B"), EOS
    ]
    # Behind the prompt " A" and eos are 3 tokens, then come those of BETWEEN, 1 + 7 + 1 + 10.
    assert (text.prompt_length, text.gaps) == (18, ((3, 22),)) and len(BETWEEN) == 19
    assert learned(text) == [[*spell(" A"), EOS], [*spell(" B"), EOS]]
    assert report.detected == "dialogues (messages), loss on each turn of the assistant"


@pytest.mark.parametrize("train_on", ["last", "completion"])
def test_only_the_last_turn_is_learned_where_that_is_asked(write, tokenizer, train_on):
    (text,), _ = load(write, tokenizer, {"messages": FOUR}, train_on=train_on)
    assert text.gaps == () and learned(text) == [[*spell(" B"), EOS]]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_may_say_that_it_is_not_to_be_learned(write, tokenizer, mark):
    (u, a, v, b), six = FOUR, turns("q", "A", "r", "B", "s", "C")
    six[3] |= mark
    texts, report = load(
        write, tokenizer, {"messages": [u, a | mark, v, b]}, {"messages": [u, a, v, b | mark]},
        {"messages": six}, {"messages": [u, a | mark, v, b | mark]},
    )
    assert [list(map(bytes, learned(text))) for text in texts] == [
        list(map(bytes, part)) for part in (
            [[*spell(" B"), EOS]], [[*spell(" A"), EOS]],
            [[*spell(" A"), EOS], [*spell(" C"), EOS]],
        )
    ]
    assert report.dropped == {"no turn is to be learned": 1}
    assert texts[1].ids == [*spell(f"{HEAD} A"), EOS]  # what follows is not read


def test_an_answer_that_nothing_stands_before_is_not_learned(write, tokenizer):
    greeting = [{"role": "assistant", "content": "hi"}, *FOUR[:2]]
    (text,), _ = load(write, tokenizer, {"messages": greeting})
    assert learned(text) == [[*spell(" A"), EOS]]


CALL = {"role": "assistant", "content": "call"}
SEEN = {"role": "tool", "content": "9"}


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("all", [[*spell(" call"), EOS], [*spell(" A"), EOS]]), ("last", [[*spell(" A"), EOS]]),
     ("completion", [[*spell(" call"), EOS, *spell("\ntool: 9\nassistant: A"), EOS]])],
)
def test_of_a_completion_the_assistants_turns_are_learned(write, tokenizer, train_on, expected):
    """What a tool answered is, too, where all of a completion is asked for; those of the prompt are
    not."""
    row = {"prompt": FOUR[:3], "completion": [CALL, SEEN, FOUR[1]]}
    (text,), _ = load(write, tokenizer, row, train_on=train_on)
    assert learned(text) == expected


def test_gaps_are_cut_with_their_text(write, tokenizer):
    row = {"messages": FOUR}
    (text,), report = load(write, tokenizer, row, most=28, overlong="truncate_response")
    assert (len(text.ids), text.gaps, report.truncated) == (28, ((3, 10),), 1)
    (text,), _ = load(write, tokenizer, row, most=20, overlong="truncate_response")
    assert (text.ids[18:], text.gaps) == (spell(" A"), ())
    (text,), _ = load(write, tokenizer, row, most=40, overlong="truncate_prompt_left")
    assert (text.prompt_length, text.gaps) == (15, ((3, 22),))
    assert learned(text) == [[*spell(" A"), EOS], [*spell(" B"), EOS]]


# As Qwen3 does, thoughts stand in the last turn alone.
THOUGHTS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ '<t>' if loop.last and m.role == 'assistant' }}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def test_a_template_that_writes_a_turn_otherwise_later_is_refused_by_row(write, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = THOUGHTS
    rows = {"messages": FOUR[:2]}, {"messages": FOUR}
    with pytest.raises(UserError, match="answer 1 otherwise once turns follow it: --train-on last"):
        load(write, tokenizer, *rows)
    (text,), report = load(write, tokenizer, *rows, bad_rows="skip")
    assert learned(text) == [[*spell("<t>A"), EOS]]
    assert [row.where[-2:] for row in report.rejected_rows] == [":2"]
    texts, _ = load(write, tokenizer, *rows, train_on="last")
    assert [learned(text) for text in texts] == [
        [[*spell("<t>A"), EOS]], [[*spell("<t>B"), EOS]]
    ]


def test_what_is_counted_is_counted_once_a_row(write, tokenizer):
    _, report = load(write, tokenizer, {"messages": turns("<|pad|>", "A", "r", "B")})
    assert report.notes == ["names of control tokens stay text, in 1 rows"]


def test_an_unknown_choice_is_refused(write, tokenizer):
    with pytest.raises(UserError, match=r"^train_on: is 'first': legal: all, last, completion"):
        load(write, tokenizer, {"messages": FOUR}, train_on="first")


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


def test_what_is_learned_is_transformers_mask_of_the_assistant(write, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    chat = shutil.copytree(folder, tmp_path / "chat")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(chat / "tokenizer.json"))
    config = json.loads((chat / "tokenizer_config.json").read_text())
    config |= {"chat_template": GENERATION, "eos_token": "<|im_end|>"}
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    said = [turns("q", "A", "r", "B", "s", " C "), [{"role": "system", "content": "s"}, *FOUR],
            [*FOUR[:2], SEEN, *FOUR[1:]], turns("é😀", "a\n\n", "<|im_end|>", "x")]
    texts, _ = load(write, load_tokenizer(chat), *({"messages": one} for one in said))
    theirs = transformers.AutoTokenizer.from_pretrained(chat)
    for one, text in zip(said[:3], texts[:3], strict=True):
        found = theirs.apply_chat_template(one, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * text.prompt_length + [1] * (len(text.ids) - text.prompt_length)
        for first, end in text.gaps:
            mask[text.prompt_length + first : text.prompt_length + end] = [0] * (end - first)
        assert found["input_ids"] == [*text.ids, *spell("\n")]  # behind the last turn
        assert found["assistant_masks"] == [*mask, 0]
    # A control token in a user's turn is text here, and ends the turn there.
    assert [bytes(part[:-1]) for part in learned(texts[3])] == [
        bytes(spell("a\n\n")), bytes(spell("x"))
    ]
