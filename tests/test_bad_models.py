"""Model folders, tokenizers and chat templates that are broken, of another kind, or hostile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import bad_inputs
from tests.bad_inputs import json_lines, named, words

world, refused = bad_inputs.world, bad_inputs.refused

Spoil = Callable[[Path], object]
ABSENT = object()
Q, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = "<!DOCTYPE html><html><body>404 Not Found</body></html>"

# ---- how a folder is spoiled ---------------------------------------------------------------------


def json_with(name: str, **changes: object) -> Spoil:
    """A JSON file of the folder with some keys changed, or ABSENT."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text("utf-8")) | changes
        kept = {key: value for key, value in values.items() if value is not ABSENT}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return spoil


def config(**changes: object) -> Spoil:
    return json_with("config.json", **changes)


def model_of(**changes: object) -> Spoil:
    """tokenizer.json with parts of its model changed."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text("utf-8"))
        values["model"] = {k: v for k, v in (values["model"] | changes).items() if v is not ABSENT}
        path.write_text(json.dumps(values), encoding="utf-8")

    return spoil


def file(name: str, content: str | bytes) -> Spoil:
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def without(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def tensors(change: Callable[[dict], object]) -> Spoil:
    """The weights after `change(name -> tensor)`."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(held)
        save_file({n: t.contiguous() for n, t in held.items()}, path, metadata={"format": "pt"})

    return spoil


def cut(count: int) -> Spoil:
    """The weights without their last bytes."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-count])

    return spoil


def header(value: object) -> Spoil:
    """Weights of a header that may lie."""
    text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return file("model.safetensors", len(text).to_bytes(8, "little") + text + bytes(64))


def index(weight_map: object) -> Spoil:
    """The weights as a shard, with an index that may lie."""
    value = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(value, encoding="utf-8")

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """A folder, a pipe, a link … where a file should be."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


@pytest.fixture
def refuses(refused, world):
    """refuses(verb, flag, source, spoil) -> the line for a spoiled copy `m` of a folder."""

    def run(verb: str, flag: str, source: str, spoil: Spoil, **more: str) -> str:
        spoil(shutil.copytree(world / source, Path("m")))
        return refused(words(verb, **{flag: "m"}, **more))

    return run


# ---- config.json ---------------------------------------------------------------------------------

SIZE, MANY = "must be an integer from 1 to 1048576", "must be an integer from 1 to 2147483648"
# More are in tests/models/test_pretrained.py.
CONFIGS = [  # what is changed in config.json, key that is named, what is told of it
    ({"model_type": ABSENT}, "model_type", "is None: supported: llama, mistral, qwen2, qwen3, gpt"),
    ({"model_type": "gpt2"}, "n_embd", f"is None: {SIZE}"),
    ({"hidden_size": "8"}, "hidden_size", f"is '8': {SIZE}"),
    ({"hidden_size": 10**12}, "hidden_size", f"is 1000000000000: {SIZE}"),
    ({"vocab_size": 10**10}, "vocab_size", f"is 10000000000: {MANY}"),
    ({"vocab_size": 257}, "vocab_size", "is 257: must be at least the tokenizer's 258"),
    ({"max_position_embeddings": "4k"}, "max_position_embeddings", f"is '4k': {MANY}"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor", "is None: rope_type linear"),
    ({"quantization_config": {"bits": 4}}, "quantization_config", "is {'bits': 4}: quantise"),
    ({"head_dim": 3}, "head_dim", "is 3: must be even: rotary positions turn pairs of channels"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window", f"is -1: {MANY}"),
]


@pytest.mark.parametrize(("changes", "key", "told"), named(CONFIGS))
def test_a_bad_value_in_config_json_is_refused_by_its_key(changes, key, told, refuses):
    line = refuses("sft", "model", "lm", config(**changes))
    assert line.startswith(f"m/config.json: {key}: {told}")


JSON_FILES = [  # content of a JSON file of the folder, what is told of it
    ("", ":1: not valid JSON at column 1: Expecting value"),
    ("{", ":1: not valid JSON at column 2: Expecting property name"),
    ('{"a": 1}\n{"a": 1}', ":2: not valid JSON at column 1: text after it"),
    ("[]", ": is a list: a JSON object"),
    ('{"a": 1, "a": 1}', ":1: key 'a' stands twice in one object"),
    ('{"a": NaN}', ":1: NaN is not JSON"),
    ('{"a": ' * 100 + "1" + "}" * 100, ":1: nested deeper than 64 levels"),
    ("Entry not found", ":1: not valid JSON at column 1: Expecting value"),
    (LFS, ":1: not valid JSON at column 1: a git-lfs pointer instead of the file: run `git lfs"),
    (HTML, ":1: not valid JSON at column 1: it looks like a web page: download the file itself"),
    (b"\x80\4\x95", ": not UTF-8 at byte 0: save the file as UTF-8"),
]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "told"), named(JSON_FILES))
def test_a_broken_json_file_of_a_model_is_refused_by_its_line(name, content, told, refuses):
    line = refuses("sft", "model", "lm", file(name, content))
    assert line.startswith(f"m/{name}{told}")


# ---- files of a folder ---------------------------------------------------------------------------

LIES = "not a whole safetensors file"


def shorter(content: str) -> str:
    """What is told of a file whose first 8 bytes, read as its header's length, are nonsense."""
    missing = 8 + int.from_bytes(content[:8].encode(), "little") - len(content)
    return f"{LIES}: {missing:,} bytes shorter than its header says"


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
WEIGHTS = [  # how the folder of a language model is spoiled, what is told of it
    (without("config.json"), "m: has no config.json: give a Hugging Face model folder"),
    (without("model.safetensors"), "m: has no model.safetensors: incomplete download?"),
    (without("tokenizer.json"), "m/tokenizer.json: no such file: give a folder with a tokenizer"),
    (instead("config.json", os.mkdir), "m/config.json: a folder: give a regular file"),
    (instead("tokenizer.json", os.mkfifo), "m/tokenizer.json: not a regular file"),
    (instead("model.safetensors", os.mkdir), "m/model.safetensors: not a regular file"),
    (instead("model.safetensors", os.mkfifo), "m/model.safetensors: not a regular file"),
    (instead("model.safetensors", lambda p: p.symlink_to("/dev/zero")), "m/model.safetensors: "),
    (file("model.safetensors", LFS), f"m/model.safetensors: {shorter(LFS)}: a git-lfs pointer ins"),
    (file("model.safetensors", HTML), f"m/model.safetensors: {shorter(HTML)}: it looks like a web"),
    (file("model.safetensors", b""), f"m/model.safetensors: {LIES}"),
    (header("hello"), f"m/model.safetensors: {LIES} "),
    (header({"a": F32 | {"data_offsets": [0, 12]}}), f"m/model.safetensors: {LIES} "),
    (header({"a": F32 | {"shape": [-4]}}), f"m/model.safetensors: {LIES} "),
    (header({"a": F32 | {"dtype": "X9"}}), f"m/model.safetensors: {LIES} "),
    (header({"a": F32 | {"shape": [2**62, 2**62]}}), f"m/model.safetensors: {LIES} "),
    (tensors(lambda held: held.update(x=held.pop(Q))), f"m: lacks '{Q}'; has 'x', which this arch"),
    (config(vocab_size=300), "m: 'model.embed_tokens.weight' is (258, 8), config.json asks for (300"
     ", 8); "),
    (config(num_hidden_layers=2), "m: holds 1 layers, config.json asks for 2: incomplete download"),
    (config(attention_bias=True), "m: lacks 'model.layers.0.self_attn.q_proj.bias'"),
    (config(model_type="qwen2"), "m: lacks 'model.layers.0.self_attn.q_proj.bias'"),
    (config(tie_word_embeddings=True), f"m: '{HEAD}' differs from the embedding it is tied to: se"),
    (config(max_position_embeddings=4), "texts.jsonl: a row of 19 tokens, the model reads 4"),
]
INDEXES = [  # model.safetensors.index.json or its weight_map, what is told of it
    ("", ":1: not valid JSON at column 1: Expecting value"),
    (LFS, ":1: not valid JSON at column 1: a git-lfs pointer"),
    ("{}", ": has no weight_map: incomplete download?"),
    ({}, ": has no weight_map: incomplete download?"),
    ({Q: "9" * 250 + ".safetensors"}, f": '{Q}' is in '{'9' * 78}…: shards are plain file names"),
    ({Q: "b.safetensors"}, f": '{Q}' is in b.safetensors, which is missing: download it"),
]


@pytest.mark.parametrize(("spoil", "told"), named(WEIGHTS))
def test_a_spoiled_model_folder_is_refused_by_file_or_tensor(spoil, told, refuses):
    assert refuses("sft", "model", "lm", spoil).startswith(told)


@pytest.mark.parametrize(("weight_map", "told"), named(INDEXES))
def test_a_bad_index_is_refused_by_its_tensor(weight_map, told, refuses):
    line = refuses("sft", "model", "lm", index(weight_map))
    assert line.startswith(f"m/model.safetensors.index.json{told}")


def test_a_tensor_in_two_shards_is_refused(refuses):
    def twice(folder: Path) -> None:
        index({Q: "a.safetensors", HEAD: "b.safetensors"})(folder)
        shutil.copy(folder / "a.safetensors", folder / "b.safetensors")

    line = refuses("sft", "model", "lm", twice)
    assert line.startswith(f"m/b.safetensors: '{HEAD}' stands in two shards")


# ---- folders that are no model -------------------------------------------------------------------

PICKLED = "pickle files are not read: convert the model to safetensors: transformers'"
LORA = '{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-7B", "r": 8}'
MERGE = "which is not read: merge it into its model first (peft's merge_and_unload), and give the r"
LORA_OF = "m: its base Qwen/Qwen2-7B: neither a local folder nor to be had from the hub ("
ALONE = "m: holds an adapter (adapter_model.bin) without adapter_config.json: download that, too"


def adapter(config: str = LORA, *kept: str) -> Spoil:
    """What peft leaves of a run, beside the files that are kept."""

    def spoil(folder: Path) -> None:
        for path in list(folder.iterdir()):
            if path.name not in kept:
                path.unlink()
        (folder / "adapter_config.json").write_text(config, encoding="utf-8")

    return spoil


def only(*names: str) -> Spoil:
    """A folder of files, and of folders where a name ends with a slash, that hold nothing."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"")

    return spoil


TRAINER = ("checkpoint-500/config.json", "checkpoint-1500/config.json", "training_args.bin")
SNAPSHOT = "snapshots/4d7a/config.json"
KINDS = [  # what the folder holds, what is told of it
    (only(), "m: is an empty folder: give a Hugging Face folder, with config.json and model.safet"),
    (adapter(), LORA_OF),
    (adapter(LORA, "tokenizer.json"), LORA_OF),
    (adapter(LORA, "tokenizer.json", "config.json"), LORA_OF),
    (file("adapter_config.json", LORA), LORA_OF),  # beside a whole model, which it would change
    (adapter('{"peft_type": "IA3"}'), f"m: holds an adapter (IA3), {MERGE}"),
    (adapter("[]"), f"m: holds an adapter (peft), {MERGE}"),
    (adapter("{"), "m/adapter_config.json:1: not valid JSON"),
    (adapter('{"peft_type": "LORA"}'), "m/adapter_config.json: base_model_name_or_path: is None"),
    (only("adapter_model.bin"), ALONE),
    (only("optimizer.safetensors", "model.safetensors", "manifest.json"),
     "m: holds checkpoints of a run (optimizer.safetensors): give the run's folder model or best"),
    (only("step-00000040/state.json"), "m: holds checkpoints of a run (step-00000040): give the r"),
    (only("q4.gguf"), "m: holds GGUF weights, which are not read (q4.gguf): give the Hugging Face"),
    (both(without("model.safetensors"), file("model.gguf", b"GGUF")), "m: holds GGUF weights, whi"),
    (only("consolidated.00.pth", "params.json"),
     "m: is in the layout of Meta or Mistral, which is not read (consolidated.00.pth): give the m"),
    (both(without("model.safetensors"), file("tf_model.h5", "")), "m: holds weights of another li"),
    (only("zero_to_fp32.py", "global_step9/"), "m: is a checkpoint of DeepSpeed (global_step9): r"),
    (only("pytorch_model_fsdp_0/"), "m: is a checkpoint in shards of FSDP (pytorch_model_fsdp_0):"),
    (only("model_world_size_2_rank_0.pt"), "m: is a checkpoint in shards of FSDP (model_world_siz"),
    (lambda m: (m / "model.safetensors").rename(m / "model-00001-of-00002.safetensors"),
     "m: holds shards without model.safetensors.index.json (model-00001-of-00002.safetensors): "),
    (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
     f"m/pytorch_model.bin: {PICKLED} from_pretrained, then save_pretrained"),
    (only("pytorch_model-00001-of-00002.bin"), f"m/pytorch_model-00001-of-00002.bin: {PICKLED}"),
    (only(*TRAINER), "m: holds models, and is none itself: give m/checkpoint-1500, or another of "),
    (only("checkpoint-5/adapter_config.json"), "m: holds models, and is none itself: give m/check"),
    (only(SNAPSHOT, "refs/main"), "m: holds models, and is none itself: give m/snapshots/4d7a"),
    (only("run.json", "best/config.json", "second/config.json"),
     "m: holds models, and is none itself: give m/best, or another of its 2"),
    (only("run.json", "checkpoints/step-00000002/model.safetensors"), "m: is a run that has not e"
     "nded: go on with --resume, or write the model of its checkpoint: minirlhf export m --merge"),
    (only("README.md", "training_args.bin"), "m/tokenizer.json: no such file: give a folder with"),
    (lambda m: [(m / "tokenizer.json").rename(m / "vocab.json"), (m / "merges.txt").touch(),
                (m / "tokenizer_config.json").unlink()],
     "m: has no tokenizer.json, and vocab.json is of no class: transformers makes one: AutoTok"),
    (only("config.json", "model.safetensors", "tokenizer.model"),
     "m/tokenizer.json: no such file: transformers makes one of tokenizer.model: AutoTokenizer.f"),
    (lambda m: (m / "vocab.json").mkdir() or (m / "tokenizer.json").unlink(),
     "m/tokenizer.json: no such file: give a folder with a tokenizer.json"),
]


@pytest.mark.parametrize(("spoil", "told"), named(KINDS))
def test_a_folder_that_is_no_model_is_refused_as_what_it_is(spoil, told, refuses):
    assert refuses("sft", "model", "lm", spoil).startswith(told)


def named_anew(prefix: str, suffix: str = "") -> Spoil:
    """The weights with something before each name, and behind it."""
    return tensors(
        lambda held: [held.update({f"{prefix}{n}{suffix}": held.pop(n)}) for n in list(held)]
    )


def added(name: str) -> Spoil:
    return tensors(lambda held: held.update({name: held[HEAD].clone()}))


MERGE_FIRST = "saved with adapters? merge them first (peft's merge_and_unload)"
ANOTHER_HEAD = "another kind of head? one linear layer is read, as models/README.md says"
WRAPPER, UNKNOWN = "saved from inside a wrapper? save the model itself", "incomplete download, or"
ORIGINS = [  # how the names of tensors differ, what they are likely to come from
    (named_anew("base_model.model."), MERGE_FIRST),
    (added("model.layers.0.self_attn.q_proj.lora_A.default.weight"), MERGE_FIRST),
    (added("model.layers.0.self_attn.q_proj.base_layer.weight"), MERGE_FIRST),
    (named_anew("", ".absmax"), "quantised? give the weights before that"),
    (added("model.layers.0.self_attn.q_proj.qweight"), "quantised? give the weights before that"),
    (named_anew("_orig_mod."), WRAPPER),
    (named_anew("module."), WRAPPER),
    (named_anew("policy."), WRAPPER),
    (added("layers.0.feed_forward.w1.weight"), "in the layout of Meta or Mistral? give the one of"),
    (added("vision_tower.x.weight"), "a model that reads images? only text is read here"),
    (added("v_head.weight"), ANOTHER_HEAD),
    (added("score.0.weight"), ANOTHER_HEAD),
    (added("x"), UNKNOWN),
]


@pytest.mark.parametrize(("spoil", "told"), named(ORIGINS))
def test_tensors_of_other_names_are_refused_with_their_likely_origin(spoil, told, refuses):
    assert f": {told}" in refuses("sft", "model", "lm", spoil)


# ---- each model of a command ---------------------------------------------------------------------

ROLES = [("reward", "model", "rm"), ("ppo", "model", "lm"), ("ppo", "ref", "lm"),
         ("ppo", "reward", "rm"), ("ppo", "critic", "rm")]


@pytest.mark.parametrize(("verb", "flag", "source"), ROLES)
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cut(3), f"m/model.safetensors: {LIES}: 3 bytes shorter"),
        (config(hidden_act="relu6"), "m/config.json: hidden_act: is 'relu6'"),
        (file("tokenizer.json", LFS), "m/tokenizer.json:1: not valid JSON at column 1: a git-lfs"),
        (tensors(lambda held: held.pop(Q)), f"m: lacks '{Q}'"),
        (adapter(LORA, "tokenizer.json"), LORA_OF),
    ],
    ids=["cut", "config", "tokenizer", "tensor", "adapter"],
)
def test_every_model_of_a_command_is_checked_alike(verb, flag, source, spoil, told, refuses):
    assert refuses(verb, flag, source, spoil).startswith(told)


@pytest.mark.parametrize(
    "words",
    [words("sample", model="m"), words("score", model="m"), ["serve", "--model", "m"],
     ["check", "--model", "m", "--data", "prompts.jsonl"], words("ppo", reward="0.5*m")],
)
def test_every_command_says_where_an_adapter_lacks_its_base(words, refused, world):
    adapter(LORA, "tokenizer.json")(shutil.copytree(world / "rm", Path("m")))
    assert refused(words).startswith(LORA_OF)


# ---- the tokenizer -------------------------------------------------------------------------------

SAYS = "m/tokenizer.json: refused by the tokenizers library: "


def names(**changes: object) -> Spoil:
    return json_with("tokenizer_config.json", **changes)


def parts(**changes: object) -> Spoil:
    return json_with("tokenizer.json", **changes)


def with_token(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 300, "content": "<x>"})
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


no_eos = both(names(eos_token=ABSENT), config(eos_token_id=ABSENT))
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
START, FIRST, SECOND = (
    {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
    {"Sequence": {"id": "B", "type_id": 1}},
)
PREFIX = {"type": "TemplateProcessing", "single": [START, FIRST], "pair": [FIRST, SECOND]}
UNNAMED = PREFIX | {"single": [START], "pair": [], "special_tokens": {}}
NAMELESS = PREFIX | {"special_tokens": {"<s>": {"id": "<s>", "ids": [999], "tokens": ["<s>"]}}}
TOKENIZERS = [  # how the folder is spoiled, what is told of it
    (file("tokenizer.json", "[]"), "m/tokenizer.json: "),
    (file("tokenizer.json", "{}"), "m/tokenizer.json: "),
    (parts(model=ABSENT), "m/tokenizer.json: "),
    (parts(version=2), SAYS),
    (parts(added_tokens="x"), "m/tokenizer.json: "),
    (parts(added_tokens=[{"id": 0}]), "m/tokenizer.json: "),
    pytest.param(parts(normalizer=CHARSMAP), SAYS, id="a panic while it is read"),
    pytest.param(parts(post_processor=UNNAMED), SAYS, id="a panic while it is used"),
    (model_of(type="Foo"), SAYS),
    (model_of(vocab={"a": 2**40}), "m/tokenizer.json: "),
    (with_token, "m/config.json: vocab_size: is 258: must be at least the tokenizer's 259"),
    (names(eos_token="</s>"), "m/tokenizer_config.json: eos_token '</s>' is not in tokenizer.json"),
    (names(eos_token=3), "m/tokenizer_config.json: eos_token is 3: a string or an object"),
    (names(bos_token={"content": 5}), "m/tokenizer_config.json: bos_token is 5: a string or an ob"),
    (names(pad_token=5), "m/tokenizer_config.json: pad_token is 5: a string or an object"),
    (config(eos_token_id="x"), "m/config.json: eos_token_id is x: an integer or several"),
    (config(eos_token_id=[0, "a"]), "m/config.json: eos_token_id is [0, 'a']: an integer or sever"),
    (config(eos_token_id=9999), "m: eos_token_id is 9999: tokenizer.json has the ids 0 to 257"),
    (file("generation_config.json", '{"eos_token_id": 999}'), "m: eos_token_id is 999: tokenizer"),
    (file("special_tokens_map.json", "[]"), "m/special_tokens_map.json: is a list: a JSON object"),
    (both(parts(added_tokens=[]), model_of(vocab={}, merges=[])), "m/tokenizer.json: no tokens: g"),
    (parts(post_processor=NAMELESS), "m/tokenizer.json: puts the id 999 before a text, which is n"),
    (names(chat_template=5), "m/tokenizer_config.json: chat_template is 5: a string, or a list of"),
    (names(chat_template=[{"name": "default", "template": 3}]), "m/tokenizer_config.json: chat_te"),
    (no_eos, "m: names no eos token, which every text ends with: set eos_token in tokenizer_confi"),
]


@pytest.mark.parametrize(("spoil", "told"), named(TOKENIZERS))
def test_a_spoiled_tokenizer_is_refused_by_its_file(spoil, told, refuses):
    assert refuses("sft", "model", "lm", spoil).startswith(told)


def test_ppo_refuses_a_policy_none_of_whose_responses_could_end(refuses):
    told = "m: names no eos token, so that no response could end: set eos_token in tokenizer_config"
    assert refuses("ppo", "model", "lm", no_eos).startswith(told)


# ---- the chat template ---------------------------------------------------------------------------

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ITS = "m (chat_template.jinja): "
TEMPLATES = [  # chat_template.jinja, what is told of it, behind the row
    ("{% for", f"{ITS}not a chat template"),
    ("{{ nothing.content }}", f"{ITS}chat template failed: 'nothing' is undefined"),
    ("{{ messages[5].content }}", f"{ITS}chat template failed"),
    ("{{ raise_exception('no system role') }}", f"{ITS}chat template failed: no system role"),
    ("{{ 1 / 0 }}", f"{ITS}chat template failed: division by zero"),
    ("{% include 'x' %}", f"{ITS}"),
    ("{% import 'os' as os %}", f"{ITS}"),
    ("{{ ''.__class__.__mro__ }}", f"{ITS}chat template failed"),
    ("{{ messages.append(1) }}", f"{ITS}chat template failed"),
    ("{{ cycler.__init__.__globals__.os.system('touch pwned') }}", f"{ITS}chat template failed"),
    ("{{ self.__init__.__globals__ }}", f"{ITS}chat template failed"),
    ("{{ '{0.__class__}'.format(messages) }}", "a text without any token"),  # it reads as ""
    ("{{ 'a' * 99999999999 }}", f"{ITS}chat template failed"),
    ("{% for i in range(99999999) %}{% endfor %}", f"{ITS}chat template failed"),
    ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
     f"{ITS}chat template failed"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", f"{ITS}chat template failed"),
    ("a" * (2**20 + 1), f"{ITS}a chat template of 1,048,577 characters"),
    ("hello", "a text without any token: remove the row"),
    ("{% for m in messages %}{{ m.text }}{% endfor %}", "a text without any token: remove the row"),
    ("{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages[0].content }}",
     "m: the chat template leaves nothing of an answer behind its prompt: change the template, or"),
]


@pytest.mark.parametrize(("template", "told"), named(TEMPLATES))
def test_a_bad_chat_template_is_refused_by_the_row_that_it_fails_on(template, told, refuses):
    Path("chat.jsonl").write_text(json_lines(ROW, ROW), encoding="utf-8")
    spoil = file("chat_template.jinja", template)
    line = refuses("sft", "model", "lm", spoil, data="chat.jsonl")
    assert line.startswith(f"chat.jsonl:1: {told}")
