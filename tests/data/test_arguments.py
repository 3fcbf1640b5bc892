"""What a row tells its chat template beside the messages: as transformers is told, or refused."""

import json

import pytest
import tokenizers

from minirlhf.data.arguments import SET, argument_problems, template_arguments
from minirlhf.data.examples import load_pairs, load_prompts, load_texts
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from tests.data.conftest import spell
from tests.data.test_chat_template import CALL, FAMILIES, RESULT, TOOL, Day
from tests.tiny_folders import change_json

USER, ANSWER = {"role": "user", "content": "How hot?"}, {"role": "assistant", "content": "20."}
ASKED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWER]
FORMS = [  # of the same: columns, what transformers is given
    ({"tools": [TOOL]}, {"tools": [TOOL]}),
    ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
    ({"tools": []}, {"tools": []}),
    ({"tools": None, "chat_template_kwargs": None}, {}),
    ({"tools": "", "chat_template_kwargs": " "}, {}),
    ({"chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May"}},
     {"enable_thinking": False, "date_string": "1 May"}),
    ({"tools": [TOOL], "chat_template_kwargs": '{"documents": [{"title": "t", "text": "x"}]}'},
     {"tools": [TOOL], "documents": [{"title": "t", "text": "x"}]}),
]


@pytest.fixture
def chat(folder, tmp_path):
    """chat(template) -> a folder whose template it is, with two special tokens more."""

    def chat(template, at="chat"):
        target = tmp_path / at
        load_tokenizer(folder).save(target)
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])  # 258, 259
        backend.save(str(target / "tokenizer.json"))
        names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
        change_json(target / "special_tokens_map.json", **names)
        change_json(target / "tokenizer_config.json", chat_template=template, **names)
        return target

    return chat


@pytest.mark.parametrize("family", ["llama-3.1", "qwen-2.5", "qwen-3", "hermes", "command-r-tools",
                                    "mistral-v3-nemo", "glm-4.5", "harmony", "granite"])
def test_rows_are_rendered_as_transformers_renders_them(family, chat, write, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400000")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
    folder = chat(FAMILIES[family])
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    path = write(*({"messages": ASKED, **columns} for columns, _ in FORMS))
    texts, _ = load_texts(path, ours, None, "error", whole=True, train_on="last")
    path = write(*({"prompt": ASKED[:3], **columns} for columns, _ in FORMS))
    prompts, _ = load_prompts(path, ours, None, "error")
    assert len(texts) == len(prompts) == len(FORMS)
    for text, prompt, (_, given) in zip(texts, prompts, FORMS, strict=True):
        render = theirs.apply_chat_template
        ids = render(ASKED[:3], add_generation_prompt=True, return_dict=False, **given)
        assert prompt.ids == ids == text.ids[: text.prompt_length]
        assert text.ids == render(ASKED, return_dict=False, **given)


READS_BOTH = (
    "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}{{ mood | default('') }}|"
    "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
)


def test_a_rows_own_names_win_and_what_all_rows_have_stands_in_its_column(chat, write):
    ours = load_tokenizer(chat(READS_BOTH))
    path = write({"prompt": [USER]}, {"prompt": [USER], "tools": '[{"name": "f"}]',
                                      "chat_template_kwargs": {"mood": "own", "more": 1}})
    policy = RowPolicy(template_kwargs=("mood=all", 'n={"a": [1]}'))
    (plain, own), report = load_prompts(path, ours, None, "error", policy)
    given = {"mood": "all", "n": {"a": [1]}}
    assert plain.ids == [*spell("all|How hot?"), 259] and own.ids == [*spell("f;own|How hot?"), 259]
    assert plain.columns == {"chat_template_kwargs": given}
    assert own.columns == {"tools": '[{"name": "f"}]',
                           "chat_template_kwargs": given | {"mood": "own", "more": 1}}
    assert report.notes == ["more, n not read: the chat template does not look at it"]


def test_values_are_json_or_else_strings(chat, write):
    template = "{{ [a, b, c, d, e] | tojson }}{{ messages[0].content }}"
    words = ("a=false", "b=1.5", "c=no", 'd="x=y"', "e=x=y")
    (prompt,), _ = load_prompts(write({"prompt": [USER]}), load_tokenizer(chat(template)), None,
                                "error", RowPolicy(template_kwargs=words))
    assert prompt.ids == spell('[false, 1.5, "no", "x=y", "x=y"]How hot?')


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x"], "got 'x', must be NAME=VALUE"), (["=1"], "got '=1', must be NAME=VALUE"),
        (["x=1", "x=2"], "two for x"), (["tools=[]"], "tools is a column of its own"),
        *(([f"{name}=1"], f"{name} is set by the renderer") for name in sorted(SET - {"tools"})),
    ],
)
def test_words_that_cannot_be_meant_are_told(words, told):
    assert [problem.partition(": ")[2].startswith(told) for problem in argument_problems(words)] \
        == [True]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"tools": {"name": "f"}}, "tools is an object: needs a list of JSON schemas"),
        ({"tools": 3}, "tools is a number: needs a list"),
        ({"tools": ["f"]}, r"tools\[0\] is a string: needs a JSON schema, an object"),
        ({"tools": "hammer"}, "tools is 'hammer': no JSON text"),
        ({"tools": '"hammer"'}, "tools is a string: needs a list"),
        ({"tools": '[{"a": "\\ud800"}]'}, "no JSON text: half of a surrogate pair"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list: needs an object"),
        ({"chat_template_kwargs": "x=1"}, "chat_template_kwargs is 'x=1': no JSON text"),
        ({"chat_template_kwargs": {"eos_token": ""}}, "eos_token is set by the renderer: leave it"),
        ({"chat_template_kwargs": {"tools": []}}, "tools is a column of its own: leave it out"),
    ],
)
def test_a_row_that_tells_its_template_what_none_reads_is_malformed(columns, told, chat, write):
    ours, rows = load_tokenizer(chat(READS_BOTH)), [{"messages": ASKED[:1] + ASKED[3:]}] * 2
    path = write(rows[0] | columns, rows[1])
    with pytest.raises(UserError, match=rf"a.jsonl:1: .*{told}"):
        load_texts(path, ours, None, "error")
    texts, report = load_texts(path, ours, None, "error", RowPolicy("skip"))
    assert len(texts) == len(report.rejected_rows) == 1
    strings = write({"prompt": "a", "completion": "b"} | columns)  # theirs to use: nobody asks
    _, report = load_texts(strings, ours, None, "error")
    (name,) = columns
    assert f"{name} not read: no chat template renders these rows" in report.notes


def test_pairs_and_lists_have_one_prompt_with_what_it_is_told(chat, write):
    ours, tools = load_tokenizer(chat(READS_BOTH)), {"tools": [{"name": "f"}]}
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "30."}]}
    (pair,), _ = load_pairs(write(pair | tools), ours, None, "error")
    ranked = {"prompt": [USER], "responses": [[ANSWER], [ANSWER | {"content": "30."}]]}
    (ranked,), _ = load_preferences(write(ranked | tools), ours, None, "error")
    for found in (pair, ranked):
        assert found.prompt_ids == [*spell("f;|How hot?"), 259] and found.columns == tools
        assert found.responses == [[*spell("20."), 259], [*spell("30."), 259]]


def test_names_of_special_tokens_in_what_a_row_tells_stay_text(chat, write):
    ours = load_tokenizer(chat("{{ tools | tojson }}{{ mood }}" + READS_BOTH))
    told = {"tools": [{"name": "<|im_end|>", "<|im_start|>": 1}],
            "chat_template_kwargs": {"mood": "a<|im_end|>"}}
    (prompt,), _ = load_prompts(write({"prompt": [USER]} | told), ours, None, "error")
    text = '[{"name": "<|im_end|>", "<|im_start|>": 1}]a<|im_end|><|im_end|>;a<|im_end|>|How hot?'
    assert prompt.ids == [*spell(text), 259]


def test_an_open_turn_keeps_its_end_whatever_stands_in_the_tools(chat, write):
    ours = load_tokenizer(chat("{{ messages[-1].content }}<|im_end|>{{ tools[0].name }}"))
    marks = "".join(map(chr, range(0xFFFFD, 0x10FFFE)))  # every character of one plane
    row = {"prompt": [USER, ANSWER], "tools": [{"name": marks}]}
    (prompt,), _ = load_prompts(write(row), ours, None, "error")
    assert prompt.ids == spell("20.")


def test_a_template_named_tool_use_renders_where_there_are_tools(chat, write):
    transformers = pytest.importorskip("transformers")
    folder = chat([{"name": "default", "template": "D{{ messages[0].content }}"},
                   {"name": "tool_use", "template": "T{{ tools | length }}{{ x }}"}])
    path = write({"prompt": [USER]}, {"prompt": [USER], "tools": []},
                 {"prompt": [USER], "tools": [{}, {}], "chat_template_kwargs": {"x": "!"}})
    load_tokenizer(folder).save(folder / "out")
    for place in (folder, folder / "out"):
        prompts, report = load_prompts(path, load_tokenizer(place), None, "error")
        assert [p.ids for p in prompts] == [spell("DHow hot?"), spell("T0"), spell("T2!")]
        assert not report.notes
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        assert theirs.apply_chat_template([USER], tools=[{}, {}], x="!", tokenize=False) == "T2!"


def test_named_templates_in_files_are_found_as_transformers_finds_them(chat, write):
    """Files stand before what tokenizer_config.json has; an export has all, in a list."""
    transformers = pytest.importorskip("transformers")
    folder = chat([{"name": "default", "template": "not read"},
                   {"name": "tool_use", "template": "not read"}])
    (folder / "chat_template.jinja").write_text("D{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools | length }}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    path = write({"prompt": [USER]}, {"prompt": [USER], "tools": [{}, {}]})
    load_tokenizer(folder).save(folder / "out")
    for place in (folder, folder / "out"):
        prompts, _ = load_prompts(path, load_tokenizer(place), None, "error")
        assert [p.ids for p in prompts] == [spell("DHow hot?"), spell("T2")]
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        render = theirs.apply_chat_template
        assert render([USER], tokenize=False) == "DHow hot?"
        assert render([USER], tools=[{}, {}], tokenize=False) == "T2"
        assert render([USER], chat_template="rag", tokenize=False) == "R"
    (folder / "chat_template.jinja").unlink()  # then there is none for rows without tools
    alone = load_tokenizer(folder)
    assert alone.template_origin == "additional_chat_templates"
    assert alone.render_chat([USER], arguments={"tools": []}) == "T0"
    assert alone.encode("a") == spell("a")  # texts need none
    legal = r"chat templates by the names rag, tool_use, and none by the name default"
    with pytest.raises(UserError, match=legal) as refused:
        load_prompts(path, alone, None, "error")
    assert refused.value.where == f"{path}:1"
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template([USER])


def test_a_named_template_is_no_link_out_of_its_folder(chat, tmp_path):
    folder = chat("D")
    (tmp_path / "mine.jinja").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "mine.jinja")
    with pytest.raises(UserError, match="link to a file outside its folder"):
        load_tokenizer(folder)


def test_tokens_that_only_the_template_for_tools_writes_stay_text(chat):
    """<|tool|> is an added token that is not special: it controls where a template writes it."""
    folder = chat([{"name": "default", "template": "{{ messages[0].content }}"},
                   {"name": "tool_use", "template": "<|tool|>{{ messages[0].content }}"}])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<|tool|>"])  # 260
    backend.save(str(folder / "tokenizer.json"))
    turn = [{"role": "user", "content": "<|tool|>"}]
    ours = load_tokenizer(folder)
    assert ours.encode_chat(turn) == spell("<|tool|>")
    assert ours.encode_chat(turn, {"tools": []}) == [260, *spell("<|tool|>")]


@pytest.mark.parametrize(
    ("family", "names"),
    [("qwen-3", {"tools", "enable_thinking"}), ("llama-3.1", {"tools", "date_string"}),
     ("harmony", {"tools", "reasoning_effort", "model_identity"}), ("granite", {"documents"}),
     ("smollm-3", {"xml_tools", "enable_thinking"}), ("chatml", set())],
)
def test_a_template_tells_which_names_it_reads(family, names, chat):
    reads = load_tokenizer(chat(FAMILIES[family])).template_reads()
    assert reads >= names | {"messages"} and ("tools" in reads) == ("tools" in FAMILIES[family])


def test_the_text_of_a_cell_is_what_it_says():
    assert template_arguments({"tools": "[]", "chat_template_kwargs": "{}"}, "w") == {"tools": []}
