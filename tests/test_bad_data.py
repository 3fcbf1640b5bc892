"""Data files that are not what they should be: each is refused by file and line, at once."""

import gzip
import os

import pytest

from tests import bad_inputs
from tests.bad_inputs import COMMANDS, PAIR, PROMPT, TEXT, json_lines, named, words, write

world, refused = bad_inputs.world, bad_inputs.refused

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DIALOGUE = {"messages": [USER, ANSWER]}
COMPLETION = {"prompt": "a", "completion": "b"}
CHATS = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "c"}]}
HH = {key: f"\n\nHuman: a\n\nAssistant: {key}" for key in ("chosen", "rejected")}
IDS = {"input_ids": [1, 2]}
ID_PAIR = {"chosen_ids": [1, 2], "rejected_ids": [1, 3]}


# ---- a line that is no JSON object ---------------------------------------------------------------

QUOTES = "Expecting property name enclosed in double quotes"
LINES = [  # second line of a .jsonl file, what is told of it
    ('{"text": "b"', "not valid JSON at column 13: Expecting ',' delimiter"),
    ("{'text': 'b'}", f"not valid JSON at column 2: {QUOTES}"),
    ('{"text": "b",}', "not valid JSON at column "),
    ('{"text": "b"} {"text": "c"}', "not valid JSON at column 15: text after it"),
    ('{"text": "b"},', "not valid JSON at column 14: text after it"),
    ('{"text": "b', "not valid JSON at column 10: a string without its closing quote"),
    ('{"text": "a\tb"}', "not valid JSON at column 12: a raw tab or line end inside a string"),
    ('{"text": "\\x41"}', "not valid JSON at column 11: Invalid \\escape"),
    ('{"text": "\\u12"}', "not valid JSON at column 1"),
    ('{"text": None}', "not valid JSON at column 10: Expecting value"),
    ('{"text": 01}', "not valid JSON at column 11: Expecting ',' delimiter"),
    ('{"text" "b"}', "not valid JSON at column 9: Expecting ':' delimiter"),
    ("// a comment", "not valid JSON at column 1: Expecting value"),
    ("{", "not valid JSON: a lone '{': write a whole JSON object a line, or an array of them in a"),
    ("[", "not valid JSON: a lone '[': write a whole JSON object a line, or an array of them in a"),
    ('{"text": NaN}', "NaN is not JSON"),
    ('{"text": "b", "n": Infinity}', "Infinity is not JSON"),
    ('{"text": "b", "n": 1e999}', "number 1e999 is not finite"),
    ('{"text": "b", "text": "c"}', "key 'text' stands twice in one object"),
    ('{"text": "b", "x": {"y": 1, "y": 1}}', "key 'y' stands twice in one object"),
    ('{"text": "b", "n": ' + "9" * 5000 + "}", "an integer of thousands of digits"),
    ('{"text": ' + "[" * 64 + "]" * 64 + "}", "nested deeper than 64 levels"),
    ('{"text": "\\ud83d"}', "half of a surrogate pair (\\ud83d) in a string"),
    ('{"text": "\\ude00\\ud83d"}', "half of a surrogate pair (\\ude00) in a string"),
    ('{"\\udc00": "b"}', "half of a surrogate pair (\\udc00) in a string"),
    ('"a string"', "a row must be a JSON object, got a string: like"),
    ('["a", "b"]', "a row must be a JSON object, got a list: like"),
    ("null", "a row must be a JSON object, got null: like"),
    ("true", "a row must be a JSON object, got true or false: like"),
    ("7", "a row must be a JSON object, got a number: like"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13: save the file as UTF-8"),
]


@pytest.mark.parametrize(("line", "told"), named(LINES))
def test_a_broken_line_is_refused_by_its_number(line, told, refused):
    line = line if isinstance(line, bytes) else line.encode()
    data = write("d.jsonl", b'{"text": "a"}\n' + line + b"\n")
    assert refused(words("sft", data=data)).startswith(f"d.jsonl:2: {told}")


# ---- a row that is of another kind than the first ------------------------------------------------

SHORTER = "--overlong drop leaves such rows out"
FILL = "remove the row or fill it in, or --allow-empty-prompt"
ROWS = [  # verb, first row, second row, what is told of the second
    ("sft", TEXT, {}, "text is missing: needs a string; keys present: none; detected: texts"),
    ("sft", TEXT, {"Text": "b"}, "text is missing: needs a string; keys present: Text;"),
    ("sft", TEXT, {"text": None}, "text is null: needs a string; keys present: text;"),
    ("sft", TEXT, {"text": 7}, "text is a number: needs a string"),
    ("sft", TEXT, {"text": False}, "text is true or false: needs a string"),
    ("sft", TEXT, {"text": ["b"]}, "text is a list: needs a string"),
    ("sft", TEXT, {"text": {"a": "b"}}, "text is an object: needs a string"),
    ("sft", TEXT, {"text": ""}, "text is empty: remove the row or fill it in"),
    ("sft", TEXT, {"text": " \n"}, "text is empty: remove the row or fill it in"),
    ("sft", TEXT, {"\x1b[31mtext\n": 1}, "text is missing: needs a string; keys present: \\x1b[31"),
    ("new", TEXT, {"text": 1}, "text is a number: needs a string"),
    ("sft", COMPLETION, {"prompt": "a"}, "completion is missing: needs a string"),
    ("sft", COMPLETION, {"prompt": "a", "completion": ""}, "completion is empty: remove the row"),
    ("sft", COMPLETION, {"prompt": "", "completion": "b"}, f"prompt is empty: {FILL}; det"),
    ("sft", COMPLETION, {"prompt": "a", "completion": 3}, "completion is a number: needs a str"),
    ("sft", DIALOGUE, {"messages": "a"}, "messages is a string: needs a list of messages"),
    ("sft", DIALOGUE, {"messages": []}, "messages is empty: remove the row or fill it in"),
    ("sft", DIALOGUE, {"messages": ["a"]}, "messages[0] is a string: needs {role: ..., content:"),
    ("sft", DIALOGUE, {"messages": [USER]}, "messages has 1 of them, the last one of role 'user'"),
    ("sft", DIALOGUE, {"messages": [USER, USER]}, "messages has 2 of them, the last one of role"),
    ("sft", DIALOGUE, {"messages": [ANSWER]}, "messages has 1 of them, the last one of role 'ass"),
    ("sft", DIALOGUE, {"messages": [USER, {"role": "assistant"}]},
     "messages[1]: content is missing: needs a string"),
    ("sft", DIALOGUE, {"messages": [USER, ANSWER | {"content": None}]},
     "messages[1]: content is null: needs a string"),
    ("sft", DIALOGUE, {"messages": [{"content": "a"}, ANSWER]},
     "messages[0]: role is missing: needs a string"),
    ("sft", DIALOGUE, {"messages": [{"from": "bard", "value": "a"}, ANSWER]},
     "messages[0]: from is 'bard': legal: human, user, gpt, assistant, system, function_call, obs"),
    ("sft", DIALOGUE, {"messages": [{"from": "gpt", "value": None}, ANSWER]},
     "messages[0]: value is null: needs a string"),
    ("sft", DIALOGUE, {"messages": [USER, {"from": "function_call", "value": "heat(Oslo)"}]},
     "messages[1]: value is 'heat(Oslo)': a function_call needs the JSON text of {name: ..., arg"),
    ("sft", DIALOGUE, {"messages": [USER | {"content": [{"text": "a"}]}, ANSWER]},
     "messages[0]: content[0] is of type None: only {type: text, text: ...} is read"),
    ("sft", {"prompt": "a", "completion": [ANSWER]}, {"prompt": "a", "completion": [USER, ANSWER]},
     "completion begins with role 'user': needs 'assistant'"),
    ("sft", DIALOGUE, {"messages": [USER | {"content": [{"type": "image_url", "text": "a"}]},
                                    ANSWER]},
     "messages[0]: content[0] is of type image_url: only {type: text, text: ...} is read"),
    ("sft", DIALOGUE, {"messages": [USER | {"content": ["a"]}, ANSWER]},
     "messages[0]: content[0] is of type a string: only {type: text, text: ...} is read"),
    ("sft", DIALOGUE, {"messages": [USER | {"content": {"text": "a"}}, ANSWER]},
     "messages[0]: content is an object: needs a string"),
    ("sft", DIALOGUE, {"messages": [USER | {"role": 1}, ANSWER]},
     "messages[0]: role is a number: needs a string"),
    ("sft", DIALOGUE, DIALOGUE | {"tools": "heat(Oslo)"}, "tools is 'heat(Oslo)': no JSON text:"),
    ("sft", DIALOGUE, DIALOGUE | {"tools": {}}, "tools is an object: needs a list of JSON schemas"),
    ("ppo", {"prompt": [USER]}, {"prompt": [USER], "chat_template_kwargs": {"messages": []}},
     "chat_template_kwargs: messages is set by the renderer: leave it out"),
    ("sft", DIALOGUE, {"messages": [USER, ANSWER | {"content": " "}]},
     "messages: the last message is empty: remove the row or fill it in"),
    ("sft", IDS, {"input_ids": "1 2"}, "input_ids is a string: needs a list of token ids"),
    ("sft", IDS, {"input_ids": []}, "input_ids is empty: remove the row or fill it in"),
    ("sft", IDS, {"input_ids": [1]}, "has no token after the first: remove the row"),
    ("sft", IDS, {"input_ids": [1, -1]}, "input_ids[1] is -1: a token id is an integer from 0"),
    ("sft", IDS, {"input_ids": [1.5, 2]}, "input_ids[0] is 1.5: a token id is an integer from 0"),
    ("sft", IDS, {"input_ids": [[1, 2]]}, "input_ids[0] is [1, 2]: a token id is an integer"),
    ("sft", IDS, {"input_ids": [1, True]}, "input_ids[1] is true: a token id is an integer from"),
    ("sft", IDS, {"input_ids": [1, 258]}, "token id 258: the tokenizer has the ids 0 to 257"),
    ("sft", IDS, {"input_ids": [1, 2**70]}, "token id 1180591620717411303424: the tokenizer has"),
    ("sft", IDS, IDS | {"attention_mask": [1]}, "attention_mask has 1 numbers, input_ids has 2"),
    ("sft", IDS, IDS | {"attention_mask": [1, 2]}, "attention_mask[1] is 2: needs 0 or 1"),
    ("sft", IDS, IDS | {"attention_mask": "11"}, "attention_mask is a string: needs a list of 0"),
    ("sft", IDS, IDS | {"attention_mask": [0, 0]}, "input_ids is empty: remove the row or fill"),
    ("sft", IDS, IDS | {"prompt_length": 2}, "prompt_length is 2: needs an integer from 0 to 1"),
    ("sft", IDS, IDS | {"prompt_length": "1"}, 'prompt_length is "1": needs an integer from 0'),
    ("reward", PAIR, {"prompt": "a", "chosen": "b"}, "rejected is missing: needs a string"),
    ("reward", PAIR, PAIR | {"rejected": None}, "rejected is null: needs a string"),
    ("reward", PAIR, PAIR | {"rejected": ""}, "rejected is empty: remove the row or fill it in"),
    ("reward", PAIR, PAIR | {"chosen": ["b"]}, "chosen is a list: needs a string"),
    ("reward", PAIR, {"chosen": "b", "rejected": "c"}, "prompt is missing: needs a string"),
    ("reward", {"chosen": "b", "rejected": "c"}, PAIR, "has a column prompt, unlike the first row"),
    ("reward", PAIR, PAIR | {"margin": "x"}, "margin is 'x': needs a finite number, or no margin"),
    ("reward", PAIR, PAIR | {"margin": "1"}, "margin is '1': needs a finite number, or no margin"),
    ("reward", PAIR, PAIR | {"margin": True}, "margin is True: needs a finite number, or no"),
    ("reward", PAIR, PAIR | {"margin": [1]}, "margin is [1]: needs a finite number, or no"),
    ("reward", PAIR, PAIR | {"margin": 1e39}, "margin is 1e+39: needs a finite number, or no"),
    ("reward", PAIR, PAIR | {"margin": 10**400}, "margin is 1000000000000000000000000000000000000"),
    ("reward", HH, HH | {"rejected": "\n\nHuman: a\n\nAssistant:"}, "rejected has an empty answer"),
    ("reward", HH, {"chosen": "b", "rejected": "c"}, "chosen and rejected share no '\\\\n\\\\nAss"),
    ("reward", CHATS, CHATS | {"rejected": [ANSWER]}, "chosen and rejected share no turns: both"),
    ("reward", CHATS, CHATS | {"rejected": [USER]}, "rejected ends with role 'user': needs 'assi"),
    ("reward", CHATS, PAIR, "has a column prompt, unlike the first row"),
    ("reward", ID_PAIR, {"chosen_ids": [1]}, "rejected_ids is missing: needs a list of token ids"),
    ("reward", ID_PAIR, ID_PAIR | {"rejected_ids": [999]}, "token id 999: the tokenizer has"),
    ("reward", ID_PAIR, ID_PAIR | {"prompt_ids": [1]}, "has a column prompt_ids, unlike the first"),
    ("ppo", PROMPT, {"prompt": ""}, "prompt is empty: remove the row or fill it in"),
    ("ppo", PROMPT, {"prompt": None}, "prompt is null: needs a string"),
    ("ppo", PROMPT, {"prompts": "a"}, "prompt is missing: needs a string; keys present: prompts"),
    ("ppo", PROMPT, {"prompt": [USER]}, "prompt is a list: needs a string"),
    ("ppo", {"prompt": [USER]}, PROMPT, "prompt is a string: needs a list of messages"),
    ("ppo", {"prompt": [USER]}, {"prompt": [{"role": "user"}]}, "prompt[0]: content is missing"),
    ("ppo", {"prompt_ids": [1]}, {"prompt_ids": [300]}, "token id 300: the tokenizer has the ids"),
    ("ppo", PROMPT, {"prompt": "a" * 45},
     f"45 tokens, max_length is 44: {SHORTER}; or lower --max-new-"),
    ("sample", PROMPT, {"prompt": "a" * 46},
     f"46 tokens, max_length is 45: {SHORTER}; or lower --max-new-"),
    ("score", TEXT, {"text": "a" * 48}, f"49 tokens, max_length is 48: {SHORTER}"),
    ("score", PAIR, PROMPT, "chosen is missing: needs a string; keys present: prompt"),
    ("score", COMPLETION, PROMPT, "completion is missing: needs a string"),
]


@pytest.mark.parametrize(("verb", "first", "second", "told"), named(ROWS))
def test_a_row_unlike_the_first_is_refused_by_its_line(verb, first, second, told, refused):
    data = write("d.jsonl", json_lines(first, second))
    assert refused(words(verb, data=data)).startswith(f"d.jsonl:2: {told}")


# ---- a file for something else -------------------------------------------------------------------

UNKNOWN = "d.jsonl:1: columns of no known format: "
TEXTS = "legal: text | prompt with completion or response | messages | input_ids; other names: -"
FIRST_ROWS = [  # verb, only row, what is told
    ("sft", {"question": "a", "answer": "b"},
     UNKNOWN + f"question (a string), answer (a string): {TEXTS}"),
    ("sft", {"conversations": "a"}, "d.jsonl:1: conversations is a string: needs a list of messages"
     "; keys present: conversations; detected: sharegpt (conversations)"),
    ("sft", {"data": [TEXT]}, UNKNOWN + "data (a list)"),
    ("sft", PAIR, UNKNOWN + "prompt (a string), chosen (a string), rejected (a string)"),
    ("sft", PROMPT, UNKNOWN + "prompt (a string)"),
    ("sft", {"text": "a" * 48}, "d.jsonl: a row of 49 tokens, the model reads 48: give --max-len"),
    ("reward", PAIR | {"chosen": "a" * 48}, "d.jsonl: a row of 57 tokens, the model reads 48: gi"),
    ("new", IDS, "d.jsonl:1: holds token ids, from which no tokenizer can be trained: give --tok"),
    ("reward", TEXT, UNKNOWN + "text (a string): legal: chosen and rejected with or without prom"),
    ("reward", PROMPT, UNKNOWN + "prompt (a string)"),
    ("reward", {"question": "a", "response_j": "b", "response_k": "c"}, UNKNOWN + "question (a s"),
    ("reward", PAIR | {"rejected": PAIR["chosen"]},
     "d.jsonl: no row left of 1: dropped: 1 (chosen equals rejected)"),
    ("ppo", {"query": "a"}, UNKNOWN + "query (a string): legal: prompt (a string or messages) | "),
    ("ppo", {"chosen": "b", "rejected": "c"}, UNKNOWN + "chosen (a string), rejected (a string)"),
    ("ppo", {"prompt": ["a"]}, UNKNOWN + "prompt (a list)"),
    ("sample", {"prompt": 1}, UNKNOWN + "prompt (a number)"),
    ("score", PROMPT, UNKNOWN + f"prompt (a string): {TEXTS}"),
]


@pytest.mark.parametrize(("verb", "row", "told"), named(FIRST_ROWS))
def test_a_file_for_another_purpose_is_refused(verb, row, told, refused):
    assert refused(words(verb, data=write("d.jsonl", json_lines(row)))).startswith(told)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS = "legal: .jsonl .json .csv .tsv .txt, each also with .gz behind, and .parquet"
ONE = "d.csv:1: one column, named "
FILES = [  # verb, file name, content, what is told
    ("sft", "d.jsonl", "", "d.jsonl: no rows"),
    ("sft", "d.jsonl", "\n \r\n", "d.jsonl: no rows"),
    ("sft", "d.jsonl", b"PK\3\4", "d.jsonl:1: not valid JSON at column 1: it looks like a zip"),
    ("sft", "d.jsonl", b"\x1f\x8b", "d.jsonl:1: not UTF-8 at byte 1: it looks like gzip"),
    ("sft", "d.jsonl", json_lines(TEXT).encode("utf-16"),
     "d.jsonl:1: not UTF-8 at byte 0: it looks like UTF-16"),
    ("sft", "d.jsonl", LFS, "d.jsonl:1: not valid JSON at column 1: a git-lfs pointer instead of"),
    ("sft", "d.txt", LFS, "d.txt:1: is no text: a git-lfs pointer instead of the file: run"),
    ("sft", "d.txt", "<!doctype html>\n", "d.txt:1: is no text: it looks like a web page"),
    ("sft", "d.jsonl", "<!DOCTYPE html>\n", "d.jsonl:1: not valid JSON at column 1: it looks like a"
     " web page: download the file itself"),
    ("sft", "d.jsonl", b"PAR1\x15\4", "d.jsonl:1: not valid JSON at column 1: it looks like Parq"),
    ("sft", "d.jsonl", b"\x80\4\x95", "d.jsonl:1: not UTF-8 at byte 0: save the file as UTF-8"),
    ("sft", "d.jsonl", "text\nThe film.\n", "d.jsonl:1: not valid JSON at column 1: Expecting val"),
    ("sft", "d\x1b[31m.jsonl", "{}", "d\\x1b[31m.jsonl:1: columns of no known format"),
    ("sft", "d.json", '{"text": "a"', "d.json:1: not valid JSON at column 13: Expecting ','"),
    ("sft", "d.json", "[]", "d.json: no rows"),
    ("sft", "d.json", '[{"text": "a"}', "d.json:1: not valid JSON: rows in"),
    ("sft", "d.json", '[{"text": "a"}\n{"text": "b"}]', "d.json:2: not valid JSON: rows in"),
    ("sft", "d.json", '[{"text": "a"},\n]', "d.json:2: not valid JSON at column 1"),
    ("sft", "d.json", '[{"text": "a"}] x', "d.json:1: not valid JSON: rows in"),
    ("sft", "d.json", '[{"text": "a"},\n\n {"text": NaN}]', "d.json:3: NaN is not JSON"),
    ("sft", "d.json", '[{"text": "a"},\n 5]', "d.json:2: a row must be a JSON object, got a numb"),
    ("sft", "d.json", '[{"text": "a"},\n{"text": 3}]', "d.json:2: text is a number: needs a strin"),
    ("sft", "d.json", '{\n  "data": [\n', "d.json:1: not valid JSON: a lone '{': write a"),
    ("sft", "d.json", '{"text": ["a"]}', "d.json:1: columns of no known format: text (a list)"),
    ("reward", "d.csv", "prompt;chosen;rejected\na;b;c\n",
     ONE + "'prompt;chosen;rejected': put ',' between columns, not ';'"),
    ("reward", "d.csv", "sep=;\nprompt;chosen;rejected\na;b;c\n", ONE + "'sep=;': put ','"),
    ("reward", "d.csv", "prompt\tchosen\trejected\na\tb\tc\n", ONE + "'prompt\\tchosen\\trejected"),
    ("reward", "d.tsv", "prompt,chosen\na,b\n", "d.tsv:1: one column, named 'prompt,chosen': put "),
    ("reward", "d.csv", "prompt,chosen,rejected\na,b\n", "d.csv:2: 2 fields: the header names 3"),
    ("reward", "d.csv", "prompt,chosen,chosen\na,b,c\n", "d.csv:1: column names must be non-empty"),
    ("sft", "d.csv", "text,\na,b\n", "d.csv:1: column names must be non-empty and differ"),
    ("sft", "d.csv", 'text,b\na,"2" x\n', "d.csv:2: not valid CSV"),
    ("sft", "d.csv", 'text,b\na,"2\n', "d.csv:2: not valid CSV"),
    ("sft", "d.csv", "text,b\n", "d.csv: no rows"),
    ("sft", "d.csv", json_lines(TEXT), "d.csv:1: a column named '{\"text\": "),
    ("reward", "d.csv", "a,b,c\nd,e,f\n", "d.csv:2: columns of no known format: a (a string), b"),
    ("reward", "d.csv", "prompt,chosen,rejected\na,b,\n", "d.csv:2: rejected is empty: remove the"),
    ("reward", "d.csv", 'prompt,chosen,rejected,margin\na,b,c,"1,5"\n', "d.csv:2: margin is '1,5'"),
    ("reward", "d.csv", "prompt,chosen,rejected,margin\na,b,c,nan\n", "d.csv:2: margin is 'nan': "),
    ("reward", "d.csv", b"prompt,chosen,rejected\n\xc4,b,c\n", "d.csv:2: not UTF-8 at byte 0: sav"),
    ("sft", "d.txt", b"a\nb\xff\n", "d.txt:2: not UTF-8 at byte 1: save the file as UTF-8"),
    ("sft", "d.jsonl.gz", json_lines(TEXT), "d.jsonl.gz: damaged gzip file: Not a gzipped file"),
    ("sft", "d.jsonl.gz", gzip.compress(b'{"text": "a"}\n3'), "d.jsonl.gz:2: a row must be a JSON"),
    ("sft", "d.gz", gzip.compress(b"{}"), f"d.gz: not a data file: ends in '.gz': {KINDS}"),
    ("sft", "d", "{}", f"d: not a data file: its name has no ending: {KINDS}"),
    ("sft", "d.parquet.gz", b"", f"d.parquet.gz: not a data file: ends in '.gz': {KINDS}"),
    *(("sft", f"d{ending}", b"", f"d{ending}: not a data file: ends in '{ending}'")
      for ending in (".py", ".arrow", ".xlsx", ".zip", ".yaml", ".pkl", ".pt", ".bz2")),
]


@pytest.mark.parametrize(("verb", "name", "content", "told"), named(FILES))
def test_a_file_that_is_not_what_its_name_says_is_refused(verb, name, content, told, refused):
    assert refused(words(verb, data=write(name, content))).startswith(told)


# ---- what is no file ----------------------------------------------------------------------------


def link_in_a_circle(name: str) -> None:
    os.symlink(name, name)


def endless_line(name: str) -> None:
    with open(name, "wb") as file:
        file.truncate(1 << 30)  # one line of a gigabyte, which takes no room on the disk


PATHS = [  # what makes d.jsonl, what is told of it
    (os.mkdir, "a folder: give a regular file"),
    (os.mkfifo, "not a regular file: give a regular file"),
    (lambda name: os.symlink("/dev/zero", name), "not a regular file: give a regular file"),
    (link_in_a_circle, "cannot be read: Too many levels of symbolic links"),
    (lambda name: os.symlink("nowhere", name), "no such file"),
    (endless_line, "1: a line of more than 16,777,216 bytes"),
]


@pytest.mark.parametrize(("make", "told"), named(PATHS))
def test_what_is_no_data_file_is_refused_at_once(make, told, refused):
    make("d.jsonl")
    line = refused(words("sft", data="d.jsonl"))
    assert line.removeprefix("d.jsonl:").strip() == told


HELD_OUT = ("sft", "new", "reward")
READERS = [(verb, "data", "{}") for verb in COMMANDS]
READERS += [(verb, "eval_data", entry) for verb in HELD_OUT for entry in ("{}", "short={}")]


@pytest.mark.parametrize(("verb", "flag", "entry"), READERS)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ": no such file"),
        ("", ": no rows"),
        ("{", ":1: not valid JSON: a lone '{'"),
        ("x", ":1: not valid"),
    ],
)
def test_every_command_refuses_bad_files_alike(verb, flag, entry, content, told, refused):
    if content is not None:
        write("d.jsonl", content)
    line = refused(words(verb, **{flag: entry.format("d.jsonl")}))
    assert line.startswith(f"d.jsonl{told}")
