"""Files made to do harm: each is read, or refused in one line, and nothing else happens."""

import json
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.examples import load_texts
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import MACHINE, Stopped, UserError
from minirlhf.models.families import config_to_hf
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.stored import tensor_names
from tests.fuzzer import LLAMA, fuzz, make_world, read_model
from tests.tiny_folders import change_json
from tests.watched import run_cases


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A right file of every kind."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def copy(world, tmp_path):
    """A copy of a folder of the world that a test may spoil."""
    return lambda name: shutil.copytree(world / name, tmp_path / name)


# ---- what watches the rest -----------------------------------------------------------------------


def two_lines():
    raise UserError("file", "one\ntwo")


def boast():
    raise UserError("file", "x" * 5000)


def spin():
    while True:
        pass


class Reaching:
    def __reduce__(self):
        return len, ("x",)


MISDEEDS = [
    (lambda: 1 / 0, "ZeroDivisionError at test_hostile.py"),
    (lambda: sys.exit(0), "SystemExit"),
    (two_lines, "a message of 13 characters"),
    (boast, "a message of 5006 characters"),
    (lambda: os.abort(), "died of SIGABRT"),
    (lambda: os._exit(0), "left without a word"),
    (spin, "died of SIGPROF"),
    (lambda: b"x" * (100 << 20), "took"),
    (lambda: bytearray(1 << 45), "MemoryError"),
    (lambda: os.system("true"), "os.system"),
    (lambda: os.posix_spawn("/bin/true", ["true"], {}), "os.posix_spawn"),
    (lambda: socket.socket().close(), "socket."),
    (lambda: pickle.loads(pickle.dumps(Reaching())), "pickle.find_class"),
    (lambda: eval("1 + 1"), "compile"),
    (lambda: exec(compile("1 + 1", "data.json", "exec")), "exec 'data.json'"),
    (lambda: Path("/etc/hosts").read_bytes(), "open '/etc/hosts'"),
    (lambda: os.mkdir("/nowhere/at/all"), "os.mkdir"),
]


def test_run_cases_sees_each_misdeed(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.watched.SECONDS", 1)
    monkeypatch.setattr("tests.watched.MEMORY", 64 << 20)
    deeds = [*(deed for deed, _ in MISDEEDS), lambda: None]
    found = run_cases(range(len(deeds)), lambda i: (f"deed {i}", deeds[i]), tmp_path)
    for i, (_, told) in enumerate(MISDEEDS):
        assert any(f.what.startswith(told) for f in found if f.case == i), (told, found[i:])
    assert {f.case for f in found} == set(range(len(MISDEEDS)))  # the last did no wrong


# ---- mutations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cases",
    [range(2_000), pytest.param(range(2_000, 102_000), marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_mutated_files_are_read_or_refused(cases, tmp_path, monkeypatch):
    monkeypatch.setattr("minirlhf.data.chat_template.SECONDS", 0.1)
    assert fuzz(tmp_path, cases) == []  # `python tests/fuzzer.py CASE` repeats one


# ---- safetensors ---------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused_by_name_and_length(copy):
    path = copy("llama") / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for cut in range(0, len(data), len(data) // 200 + 1):
        path.write_bytes(data[:cut])
        missing = f"{len(data) - cut:,} bytes" if cut >= start else "bytes"
        match = rf"model.safetensors: not a whole safetensors file: .*{missing} shorter than its"
        with pytest.raises(UserError, match=match):
            load_pretrained(path.parent)
        with pytest.raises(UserError, match=match):
            tensor_names([path])


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ENTRY = b'"x%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
BOMBS = [
    (header(b"{" + b" " * (16 << 20) + b"}"), "a safetensors header of 16,777,218 bytes: at most"),
    (header(b"{" + b",".join(ENTRY % i for i in range(200_001)) + b"}"), "more than 200,000 ten"),
    (header(b"{}", 2**64 - 1), "18,446,744,073,709,551,6.. bytes shorter than its header says"),
    (header(b"{}", 2**63), "9,223,372,036,854,775,8.. bytes shorter than its header says"),
    (header(b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), ": 36 bytes shorter"),
    (header(b"[" * 99_999), "not a whole safetensors file"),
    (header(b'{"x":{"dtype":"F32","shape":[%d,2],"data_offsets":[0,0]}}' % 2**63), "not a whole"),
]


@pytest.mark.parametrize("data, told", BOMBS, ids=[told[:20] for _, told in BOMBS])
def test_a_header_bomb_is_refused_before_it_is_read(data, told, copy):
    path = copy("llama") / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=told):
        load_pretrained(path.parent)
    assert run_cases([0], lambda _: ("bomb", lambda: read_model("llama")(path.parents[1])),
                     path.parents[1]) == []


def test_weights_that_no_memory_holds_are_refused(copy, monkeypatch):
    folder = copy("llama")
    sizes = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    with pytest.raises(
        UserError, match=r"weights of [\d,]+ bytes, this machine has 4,096"
    ) as error:
        load_pretrained(folder)
    assert error.value.code == MACHINE


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "shard"])
@pytest.mark.parametrize("protocol", ["torch", 2, 4, 5])
def test_a_pickle_is_refused_whatever_its_name(name, protocol, copy, tmp_path):
    folder, canary = copy("llama"), Canary(tmp_path / "canary")
    path = folder / name.replace("shard", "a.safetensors")
    (folder / "model.safetensors").unlink()
    if name == "shard":
        change_json(folder / "model.safetensors.index.json", weight_map={"x": path.name})
    if protocol == "torch":
        torch.save(canary, path)
    else:
        path.write_bytes(pickle.dumps(canary, protocol))
    with pytest.raises(UserError, match=f"{path.name}: pickle files are not read: convert"):
        load_pretrained(folder)
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary)).close()
    assert canary.path.exists()  # it would have sung


# ---- names ---------------------------------------------------------------------------------------

OUTSIDE = [
    "../m.safetensors", "../../m.safetensors", "/m.safetensors", "//m.safetensors",
    "./m.safetensors", "a/m.safetensors", "a\\m.safetensors", "..\\m.safetensors",
    "C:\\m.safetensors", "C:m.safetensors", "m.safetensors/", "m.safetensors/..",
    "m.safetensors\n", "m.safetensors\0", "\0m.safetensors", "m.safetensors ", " m.safetensors",
    "~/m.safetensors", "~m.safetensors", "$HOME/m.safetensors", "${HOME}.safetensors",
    "file:///m.safetensors", "https://x.org/m.safetensors", "m.bin", "m.pt", "m.safetensors.bin",
    "", ".", "..", "m.safetensors\u2028", "\u202em.safetensors", "%2e%2e.safetensor",
    "m*.safetensors", "m?.safetensors", "\t.safetensors", 5, None, True, ["a.safetensors"], {},
]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_an_index_names_plain_files_only(name, copy):
    folder = copy("shards")
    shutil.copy(next(folder.glob("m-*.safetensors")), folder.parent / "m.safetensors")
    change_json(folder / "model.safetensors.index.json", weight_map={"x\n": name})
    with pytest.raises(UserError, match=r"index.json: 'x\\n' is in .*: shards are plain") as error:
        load_pretrained(folder)
    assert str(error.value).isprintable()


LINKED = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "generation_config.json", "m-00.safetensors")


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("target", ["../secret", "{folder}/../secret", "{name}", "/etc/hosts"])
def test_a_link_that_leaves_the_folder_is_refused(name, target, copy):
    folder = copy("shards" if name.startswith("m-") else "llama")
    train_tokenizer([], 258, folder.parent / "t")
    for file in (folder.parent / "t").iterdir():
        shutil.copy(file, folder)
    (folder.parent / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target.format(folder=folder, name=name))  # the third: to itself
    with pytest.raises(UserError, match=f"{name}: is a link to a file outside its folder"):
        load_tokenizer(folder)
        load_pretrained(folder)


def test_links_of_the_hubs_cache_are_followed(copy):
    source = copy("llama")
    cache = source.parent / "models--own--model"
    folder = cache / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(cache / "blobs" / f"{i:040x}")
        (folder / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert load_pretrained(folder).config.hidden_size == 8
    # Newer: some files are links to a store of the whole cache, by the hash of what they hold.
    (weights,) = folder.glob("*.safetensors")
    blob, name = cache / "blobs" / Path(os.readlink(weights)).name, "ab" + "0" * 62
    store = cache.parent / "blobs" / "ab"
    store.mkdir(parents=True)
    blob.rename(store / name)
    blob.symlink_to(f"../../blobs/ab/{name}")
    assert load_pretrained(folder).config.hidden_size == 8
    (store / name).rename(store / "secret")
    blob.unlink()
    blob.symlink_to("../../blobs/ab/secret")
    with pytest.raises(UserError, match="outside its folder"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../other")
    with pytest.raises(UserError, match="outside its folder"):
        load_pretrained(folder)


# ---- config.json ---------------------------------------------------------------------------------

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
ABSURD = (10**12, 2**63, 2**20, 1024, -1, 0, 1.5, 1e308, "8", [8], {"a": 8}, True, "x" * 10**6)


def test_a_hostile_config_takes_neither_time_nor_memory(world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "llama")
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    configs = [values | {key: value} for key in SIZES for value in ABSURD]
    rope = [{"factor": 1e-300}, {"rope_theta": 1.0}, {"beta_fast": 1e-29}, {"factor": 10**29},
            {"original_max_position_embeddings": 2**31}, {"beta_slow": 1e29}]
    configs += [values | {"rope_parameters": values["rope_parameters"] | more} for more in rope]
    assert len(configs) == 110

    def make(i):
        (tmp_path / "llama" / "config.json").write_text(json.dumps(configs[i]))
        return str(configs[i])[:200], lambda: read_model("llama")(tmp_path)

    assert run_cases(range(len(configs)), make, tmp_path) == []


def test_keys_that_name_code_are_neither_followed_nor_kept(copy, tmp_path):
    folder = copy("llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    code = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "_attn_implementation_internal": "owner/kernel", "trust_remote_code": True,
    }
    change_json(folder / "config.json", **code)
    train_tokenizer([], 262, tmp_path / "t")
    named = {"AutoTokenizer": ["evil.T", None]}
    change_json(tmp_path / "t" / "tokenizer_config.json", auto_map=named)
    found = run_cases([0], lambda _: ("code", lambda: read_model("llama")(tmp_path)), tmp_path)
    assert found == []
    assert not (tmp_path / "canary").exists()
    lm = load_pretrained(folder)
    assert not code.keys() & config_to_hf(lm.config).keys()
    load_tokenizer(tmp_path / "t").save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


# ---- tokenizer -----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working folder with a tokenizer of 258 ids whose model has no weights yet, and data."""
    monkeypatch.chdir(tmp_path)
    train_tokenizer([], 258, tmp_path / "m")
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}
    Path("rows.jsonl").write_text(json.dumps(row))
    change_json(tmp_path / "m" / "config.json", **LLAMA)
    return tmp_path / "m"


VERBS = {
    "sft": "sft --model m --data rows.jsonl --out out",
    "reward": "reward --model m --data rows.jsonl --out out",
    "ppo": "ppo --model m --data rows.jsonl --out out --reward m --max-new-tokens 2",
    "grpo": "grpo --model m --data rows.jsonl --out out --reward m --max-new-tokens 2",
    "sample": "sample --model m --data rows.jsonl --max-new-tokens 2",
    "score": "score --model m --data rows.jsonl",
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rows", [257, 258, 259])
def test_every_command_refuses_ids_without_an_embedding(verb, rows, small, capsys):
    change_json(small / "config.json", vocab_size=rows)
    assert main(VERBS[verb].split()) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    short = "m/config.json: vocab_size: is 257: must be at least the tokenizer's 258"
    assert told.startswith(f"error: {short if rows < 258 else 'm: has no model.safetensors'}")


def test_special_tokens_of_a_million_characters_are_refused(small):
    source = json.loads((small / "tokenizer.json").read_text())
    first = source["added_tokens"][0]
    long = first | {"id": 1, "content": "x " * 65530}
    change_json(small / "tokenizer.json", added_tokens=[first, long])
    match = r"tokenizer.json: special tokens of 131,073 characters: at most 131,072"
    with pytest.raises(UserError, match=match):  # <|endoftext|> has 13
        load_tokenizer(small)


def test_a_panic_of_the_library_is_one_line(small, capfd):
    single = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    change_json(small / "tokenizer.json", post_processor=template)
    with pytest.raises(UserError, match=r"refused by the tokenizers library: no entry found for"):
        load_tokenizer(small)
    assert capfd.readouterr().err == ""  # Rust would tell of it as well
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_closed_stderr_hinders_nothing(small, monkeypatch):
    def closed(handle):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    assert load_tokenizer(small).vocab_size == 258


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit, Stopped])
def test_a_signal_inside_the_library_is_no_refusal(leaving, small):
    def leave():
        raise leaving

    with pytest.raises(leaving):
        load_tokenizer(small)._guard(leave)


def test_a_stray_key_of_another_kind_of_tokenizer_is_ignored(small):
    model = json.loads((small / "tokenizer.json").read_text())["model"]
    change_json(small / "tokenizer.json", model=model | {"unk_id": 0})  # Unigram's, in a BPE
    assert load_tokenizer(small).vocab_size == 258


@pytest.mark.parametrize("entry", [{"name": [], "template": "x"}, {"template": "x"}, 5])
def test_a_chat_template_without_a_name_is_refused(entry, small):
    named = [{"name": "default", "template": "x"}, entry]
    change_json(small / "tokenizer_config.json", chat_template=named)
    told = r"chat_template is \[.*: a string, or a list of named ones"
    with pytest.raises(UserError, match=told):
        load_tokenizer(small)


# ---- chat templates ------------------------------------------------------------------------------

REWRITING = {
    "marks the last": "{% for m in messages %}{{ m.content }}{{ '!' if loop.last }}{% endfor %}",
    "counts": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "opens": "{% for m in messages %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}",
    "turns round": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",  # the answer first
}


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_no_text_of_the_user_is_learned_from_a_template_that_rewrites_the_prompt(
    template, small, tmp_path
):
    change_json(small / "tokenizer_config.json", chat_template=template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "t.jsonl").write_text(f"\n{json.dumps({'messages': turns})}\n")
    tokenizer = load_tokenizer(small)
    if "::-1" in template:
        with pytest.raises(UserError, match=r"t.jsonl:2: .*leaves nothing of an answer"):
            load_texts(tmp_path / "t.jsonl", tokenizer, None, "drop")
        return
    (text,), report = load_texts(tmp_path / "t.jsonl", tokenizer, None, "drop")
    assert tokenizer.decode(text.ids[text.prompt_length :]).strip("!False") == "b"
    assert "writes the prompt otherwise" in report.notes[0]
