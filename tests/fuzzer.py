"""Seeded mutations of every kind of file that comes from elsewhere, and children that open them.

Case i is a function of i alone: `python tests/fuzzer.py 4711` repeats case 4711 and says what came
of it; `python tests/fuzzer.py 0 100000` runs a range. What must hold is told in watched.py.
"""

import hashlib
import json
import random
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from minirlhf.data.examples import load_pairs, load_prompts, load_texts
from minirlhf.data.formats import pair_format, text_format
from minirlhf.data.rankings import ranking_format
from minirlhf.data.split import split_rows
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.data.unpaired import load_unpaired
from minirlhf.errors import UserError
from minirlhf.files.folders import resolve
from minirlhf.files.sieve import RowPolicy, Sieve
from minirlhf.models import pretrained
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import TENSORS, save_adapter
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.rewards.load import check_answers
from minirlhf.rewards.parse import parse_source
from minirlhf.run import checkpoint, flags
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from tests.data import test_published as published
from tests.watched import Finding, run_cases

LLAMA = {
    "model_type": "llama", "vocab_size": 270, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "eos_token_id": 0, "attention_bias": False, "initializer_range": 0.02,
    "rope_parameters": {
        "rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0,
        "original_max_position_embeddings": 8,
    },
}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 270, "n_embd": 8, "n_head": 2, "n_layer": 1,
    "n_positions": 16, "activation_function": "gelu_new", "eos_token_id": [0, 1],
}
CHATML = (
    "{%- set ns = namespace(found=false) -%}{% for m in messages %}{% if m['role'] == 'system' and "
    "loop.index0 == 0 %}{% set ns.found = true %}{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% macro turn(role) %}<|im_start|>{{ role }}\n"
    "{% endmacro %}{% if add_generation_prompt %}{{ turn('assistant') }}{% endif %}"
)
CODE = (  # pieces that a template is mutated with
    "{{ 'a' * 10**9 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages * 1000 }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('id') }}", "{{ loop }}",
    "{{ '%999999999d' % 1 }}", "{{ m | tojson(indent=10**8) }}", "{% endfor %}", "{{ turn(turn) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "{{ ns }}", "{{ messages[10**9] }}",
    "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}", "{% include '/etc/passwd' %}", "{{ m.x.y }}",
    "{{ '{:9999999}'.format(1) }}", "{{ raise_exception(messages) }}", "| center(10**9)", "| join",
    "| replace('a', 'b' * 9999)", "{% for x in messages recursive %}{{ loop(messages) }}",
    "{{ 9**9**9 }}", "{% set x %}", "{% block a %}{{ self.a() }}{% endblock %}", "~ messages", "{#",
)
NUMBERS = (
    0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64,
    10**12, 10**30, 0.5, -0.0, 1e-300, 5e-324, 1e308, -1e308,
)
TEXTS = (
    "", "\0", "\n", "../../etc/passwd", "/etc/passwd", "~/.ssh/id_rsa", "C:\\con", "%s%n%99999d",
    "{0.__class__}", "${HOME}", "\x1b[2J\x1b]0;x\a", "\u202egnp", "\ufeff", "\ud7ff", "😀" * 9,
    "<|im_end|>", "<|endoftext|>", "nan", "Infinity", "(a+)+$", "[", "null", "a" * 5000,
)
RAW = (  # JSON that json.dumps would not write
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"1e-400", b"[" * 100_000, b'{"a":' * 3000, b"01",
    b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\x80", b"{}", b"[]", b"null", b'{"a":1,"a":2}', b",",
    b"-", b'"', b"\\", b"\x00", b"\n", b"0x10", b"1_000", b"inf", b"0x" + b"f" * 9000,
)


class Target(NamedTuple):
    """One kind of file.

    Args:
        files: those that are mutated, by their path below the root.
        mutate: (bytes of the file, rng) -> other bytes.
        load: opens all of it as the package does; is given the root.
    """

    files: tuple[str, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    load: Callable[[Path], object]


# --------------------------------------------------------------------------------------- mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.choices(range(len(data) + 1), k=2))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[min(end, at + rng.choice((1, 4, 64))) :]
        case 2:
            return data[:end] + data[at:end] + data[end:]
        case 3:
            return data[:at] + rng.choice(RAW) + data[at:]
        case 4:
            return data[:at] + rng.randbytes(rng.choice((1, 8, 64))) + data[at:]
        case 5:
            return data[:at] + data[at:].replace(data[at : at + 1], rng.choice(RAW), 1)
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _places(node: object) -> Iterator[tuple[object, object]]:
    """(container, key or index) of every value below a node."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _value(old: object, rng: random.Random) -> object:
    """Another value in place of one, of its type or of any."""
    # A tiny vocabulary reads "huge" as 200,000 tokens, and a case reads its file twice, a dialogue
    # once for each turn that is learned.
    made = {"huge": lambda: "word " * 40_000, "deep": lambda: json.loads("[" * 70 + "]" * 70)}
    plain = (*NUMBERS, *TEXTS, None, True, False, [], {}, [None], {"": 0}, float("nan"))
    draw = rng.random()
    if draw < 0.01:
        return rng.choice(list(made.values()))()
    if draw < 0.3 and type(old) in (int, float):
        return rng.choice((old + 1, old - 1, -old, old * 2, old * 1e6, str(old), [old], bool(old)))
    if draw < 0.3 and isinstance(old, str):
        cut = rng.randrange(len(old) + 1)
        return rng.choice((old + "x", old[:cut], old.upper(), old * 3, [old], {old: old}))
    if draw < 0.3 and isinstance(old, list) and old:
        return rng.choice((old[1:], old[:-1], old * 2, old[::-1], old[0], old * 50, [old]))
    return rng.choice(plain)


def mutate_tree(tree: object, rng: random.Random) -> object:
    """Changes a value, or drops, renames or copies a key, at some places of a JSON tree."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree)) if isinstance(tree, dict | list) else []
        if not places:
            return _value(tree, rng)
        node, key = rng.choice(places[:40] if rng.random() < 0.5 else places)
        match rng.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice((*TEXTS, f"{key}s", str(key).upper()))] = node.pop(key)
            case 2:
                node[key] = json.loads(json.dumps(rng.choice(places)[0]))
            case _:
                node[key] = _value(node[key], rng)
    return tree


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    tree = mutate_tree(json.loads(data), rng)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(text, rng) if rng.random() < 0.1 else text


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + size], rng)
    length = rng.choice((len(header),) * 9 + (2**64 - 1, 2**63, 2**24 + 1, 0, 1, size))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def mutate_position(data: bytes, rng: random.Random) -> bytes:
    """Where a reward model is read, and what decides beside it."""
    values = json.loads(data)
    for name in rng.sample(("score_position", "pad_token_id", "read_before_eos"), 2):
        values[name] = _value(values.get(name), rng)
    return json.dumps(values).encode("utf-8", "surrogatepass")


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    text = data.decode()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.5:  # where a statement or an expression begins or ends
            at = rng.choice([found.start() for found in re.finditer("{[{%]|[%}]}", text)] or [at])
        text = text[:at] + rng.choice(CODE) + text[at:]
    return mutate_bytes(text.encode(), rng) if rng.random() < 0.3 else text.encode()


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    name = lines[at].partition("=")[0]
    value = rng.choice((*map(repr, NUMBERS), *map(json.dumps, TEXTS), *map(repr, RAW), "nan", "inf",
                        "1979-05-27", "[1, 2]", "{a = 1}", "0x" + "f" * 5000))
    lines[at] = rng.choice((f"{name}={value}", f"{name}={value}\n{lines[at]}", f"[{name}]", value))
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(text, rng) if rng.random() < 0.3 else text


def mutate_state(data: bytes, rng: random.Random) -> bytes:
    """A manifest that is changed and sealed again, so that what it says is looked at."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    tree = mutate_tree(json.loads(data), rng)
    tree = {k: v for k, v in tree.items() if k != "seal"} if isinstance(tree, dict) else {}
    body = json.dumps(tree, indent=2, ensure_ascii=False).removesuffix("\n}")
    seal = hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()
    return f'{body},\n  "seal": "{seal}"\n}}\n'.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------- files


def tokenizer_json(model: dict, **parts: object) -> str:
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(("<|endoftext|>", "<|pad|>"))
    ]
    values = {"version": "1.0", "added_tokens": added, **dict.fromkeys(names), **parts}
    return json.dumps(values | {"model": model})


WORDS = ["<|endoftext|>", "<|pad|>", "[UNK]", "a", "b", "▁", "##a", "good", "film", "the", "0", "A"]
TOKENIZERS = {  # a small one of each kind, beside the byte-level BPE
    "unigram": tokenizer_json(
        {"type": "Unigram", "unk_id": 2, "vocab": [[w, -float(i)] for i, w in enumerate(WORDS)],
         "byte_fallback": False},
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                       "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                 "split": True},
    ),
    "wordpiece": tokenizer_json(
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100, "vocab": {w: i for i, w in enumerate(WORDS)}},
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                    "strip_accents": None, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
        },
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "wordlevel": tokenizer_json(
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {w: i for i, w in enumerate(WORDS)}},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+|[a-z]+"}, "behavior": "Isolated",
             "invert": False},
            {"type": "Digits", "individual_digits": True}]},
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"},
    ),
}
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the <|pad|> film"}]
ANSWER, BAD = ([{"role": "assistant", "content": text}] for text in (" good\n", "bad"))
ROWS = {
    "pairs": [{"prompt": "the film", "chosen": " is good", "rejected": " is bad", "margin": 0.5}],
    "turns": [{"prompt": TURNS, "chosen": ANSWER, "rejected": BAD, "source": [1, {"a": 2}]}],
    "ids": [{"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6], "chosen_mask": [1, 0]}],
    "prompts": [{"prompt": "the film", "answer": "good"}],
    "answers": [{"prompt": "the film", "answer": "6 * 3 = 18\n#### 18", "id": 1.5}],
    "texts": [{"prompt": TURNS, "completion": ANSWER, "tools": '[{"name": "film"}]',
               "chat_template_kwargs": {"mood": [1, {"a": "<|pad|>"}]}}],
    "plain": [{"text": "the film is good"}],
    "talk": [{"messages": [*TURNS, *ANSWER, TURNS[1], BAD[0] | {"weight": 0}, TURNS[1], *ANSWER]}],
    "liked": [{"prompt": TURNS, "completion": ANSWER, "label": False}],
}
PUBLISHED = {  # folder of files, each of one row of a published shape -> what detects them
    "published/texts": (text_format, [row for row, *_ in published.TEXTS]),
    "published/pairs": (pair_format, [row for row, *_ in published.PAIRS]),
    "published/lists": (ranking_format, [published.ULTRA, published.NECTAR]),
}
CHECKED = check_answers([parse_source(rule) for rule in ("math", "exact")])
LOAD = {"pairs": load_pairs, "turns": load_pairs, "ids": load_pairs, "prompts": load_prompts,
        "answers": partial(load_prompts, finish=CHECKED), "liked": load_unpaired}
SETTINGS = {
    "model": "policy", "data": "prompts.jsonl", "out": "out", "reward": ["reward"], "steps": 3,
    "learning_rate": 3e-6, "kl_target": 6.0, "lora_rank": 0, "whiten_advantages": False, "seed": 1,
    "stop": ["a", "b"], "dtype": "float32", "temperature": 0.7,
}
GROUPS = {
    "samples_per_prompt": 4, "resample": 2, "advantage": "rloo", "policy_loss": "clip",
    "loss_mean": "fixed", "kl_coef": 0.04, "kl_in": "reward", "kl_estimator": "k1",
    "clip_high": 0.28, "dual_clip": 3.0, "mini_batches": 2, "missing_eos": "ramp",
    "missing_eos_penalty": 1.0, "missing_eos_buffer": 4,
}


def tiny(values: dict) -> CausalLM:
    return initialize(CausalLM(config_from_hf(values)), torch.Generator().manual_seed(0))


def make_state() -> checkpoint.TrainState:
    model = torch.nn.Linear(2, 1)
    return checkpoint.TrainState(model, make_optimizer(model, 0.1))


def make_world(root: Path) -> None:
    """A right file of every kind."""
    for name, values in (("llama", LLAMA), ("gpt2", GPT2)):
        pretrained.save_pretrained(tiny(values), root / name)
    scorer = initialize_score(RewardModel(tiny(LLAMA)), torch.Generator().manual_seed(1))
    pretrained.save_pretrained(scorer, root / "reward", pad_token_id=1)
    openrlhf = LLAMA | {"normalize_reward": True, "mean": 1.5, "std": 2.0, "value_head_prefix": "x"}
    pretrained.save_pretrained(ValueHeadModel(tiny(openrlhf)), root / "peer")
    adapted = add_lora(tiny(GPT2), 2, 4.0, targets=("*.0.*", "*.down_proj"), dora=True)
    save_adapter(adapted, root / "adapter", "../gpt2")
    save_adapter(add_lora(scorer, 2, 4.0), root / "adapter/scorer", "llama", pad_token_id=1)
    pretrained.save_pretrained(tiny(LLAMA), root / "shards")
    tensors = load_file(root / "shards" / "model.safetensors")
    (root / "shards" / "model.safetensors").unlink()
    for i, name in enumerate(sorted(tensors)):
        save_file({name: tensors[name]}, root / "shards" / f"m-{i % 3}{i // 3}.safetensors")
    index = {name: f"m-{i % 3}{i // 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    made = {"metadata": {"total_size": 1}, "weight_map": index}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(made))
    train_tokenizer(["the film is good"] * 3, 262, root / "bpe")
    for name, source in TOKENIZERS.items():
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(source)
    for name in ("bpe", *TOKENIZERS):
        (root / name / "tokenizer_config.json").write_text(json.dumps({
            "eos_token": "<|endoftext|>", "pad_token": {"content": "<|pad|>"}, "auto_map": {},
            "chat_template": [{"name": n, "template": CHATML} for n in ("default", "tool_use")],
            "bos_token": None,
        }))
        for other in ("special_tokens_map", "generation_config", "config"):
            (root / name / f"{other}.json").write_text('{"eos_token_id": [0], "vocab_size": 270}')
    (root / "chat").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "chat" / name).write_bytes((root / "bpe" / name).read_bytes())
    (root / "chat" / "chat_template.jinja").write_text(CHATML)
    (root / "chat" / "additional_chat_templates").mkdir()
    (root / "chat" / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML)
    for name, rows in ROWS.items():
        lines = [json.dumps(row) for row in rows * 3]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    for folder, (_, rows) in PUBLISHED.items():
        (root / folder).mkdir(parents=True)
        for i, row in enumerate(rows):
            (root / folder / f"{i}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    state = make_state()
    state.model(torch.ones(1, 2)).sum().backward()
    state.optimizer.step()
    state.meters.update({"loss": 1.0})
    checkpoint.save_checkpoint(state, root / "checkpoints")
    (root / "run.json").write_text(json.dumps(SETTINGS))
    of_ppo = "kl_target", "whiten_advantages"
    both = {name: value for name, value in SETTINGS.items() if name not in of_ppo}
    (root / "grpo.json").write_text(json.dumps(both | GROUPS))
    toml = (f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items())
    (root / "run.toml").write_text("\n".join(toml))


# ----------------------------------------------------------------------------------------- loaders


def read_model(folder: str, load: Callable = pretrained.load_pretrained) -> Callable[[Path], None]:
    def read(root: Path) -> None:
        model = load(root / folder, dtype=torch.float32)
        tokens = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            scores = isinstance(model, RewardModel)
            model(tokens, torch.tensor([3])) if scores else model.logits(model(tokens))
        pretrained.remarks([root / folder], torch.bfloat16)

    return read


def read_tokenizer(folder: str) -> Callable[[Path], None]:
    def read(root: Path) -> None:
        tokenizer = load_tokenizer(root / folder)
        tokenizer.encode_batch(["the film <|pad|> is\n good", "", "\U0001f600 naïve\0"])
        tokenizer.decode([0, 1, 2, 5, 10**6])
        tokenizer.encode_dialogue(TURNS, ANSWER)
        for arguments in ({}, {"tools": []}):
            tokenizer.encode_chat(TURNS + ANSWER, arguments)
        tokenizer.spare_pad_token()
        tokenizer.files()

    return read


def read_rows(name: str) -> Callable[[Path], None]:
    """Refuses what is malformed; leaves it out, which may leave nothing, and loses no row."""
    load = LOAD.get(name, load_texts)

    def read(root: Path) -> None:
        arguments = root / f"{name}.jsonl", load_tokenizer(root / "chat"), None, "drop"
        with suppress(UserError):
            kept, report = load(*arguments, policy=RowPolicy("skip", True, True))
            left_out = len(report.rejected_rows) + sum(report.dropped.values())
            assert report.rows == len(kept) + left_out
            assert len({row.where for row in report.rejected_rows}) == len(report.rejected_rows)
        load(*arguments)

    return read


def read_published(folder: str) -> Callable[[Path], None]:
    """Refuses or drops rows that are not of their shape, and loses none."""

    def read(root: Path) -> None:
        for path in sorted((root / folder).iterdir()):
            for policy in (RowPolicy("skip", chat=True), RowPolicy()):
                with suppress(UserError):
                    split = split_rows(
                        path, PUBLISHED[folder][0], Sieve(policy), asking=policy.chat
                    )
                    left_out = len(split.sieve.rejected) + sum(split.report.dropped.values())
                    assert split.report.rows == len(split.rows) + left_out
                    json.dumps([parts for _, parts in split.rows])

    return read


def read_checkpoint(root: Path) -> None:
    newest, _ = checkpoint.newest_commit(root / "checkpoints")
    checkpoint.load_checkpoint(make_state(), newest)


def read_settings(name: str, config: type = PPOConfig) -> Callable[[Path], object]:
    return lambda root: flags.parse(config, ["--config", str(root / name)], "minirlhf")


COMMIT = "checkpoints/step-00000000"
TARGETS = (
    *(Target((f"{n}.jsonl",), mutate_lines, read_rows(n)) for n in ROWS),
    *(Target(tuple(f"{folder}/{i}.jsonl" for i in range(len(rows))), mutate_lines,
             read_published(folder)) for folder, (_, rows) in PUBLISHED.items()),
    *(Target((f"{n}/config.json",), mutate_json, read_model(n)) for n in ("llama", "gpt2")),
    Target(("shards/model.safetensors.index.json",), mutate_json, read_model("shards")),
    *(Target((f"{n}/model.safetensors",), mutate_safetensors, read_model(n))
      for n in ("llama", "gpt2")),
    Target(("reward/model.safetensors", "reward/config.json"), mutate_safetensors,
           read_model("reward", pretrained.load_reward_model)),
    Target(("peer/value_head.safetensors", "peer/config.json"), mutate_safetensors,
           read_model("peer", pretrained.load_reward_model)),
    Target(("reward/config.json",), mutate_position,
           read_model("reward", pretrained.load_reward_model)),
    *(Target((f"adapter/{name}",), mutate, read_model("adapter"))
      for name, mutate in (("adapter_config.json", mutate_json), (TENSORS, mutate_safetensors))),
    Target((f"adapter/scorer/{TENSORS}",), mutate_safetensors,
           read_model("adapter/scorer", pretrained.load_reward_model)),
    *(Target((f"{n}/tokenizer.json",), mutate_json, read_tokenizer(n))
      for n in ("bpe", *TOKENIZERS)),
    Target(tuple(f"bpe/{n}.json" for n in ("tokenizer_config", "special_tokens_map",
                                           "generation_config", "config")),
           mutate_json, read_tokenizer("bpe")),
    *(Target((f"chat/{n}.jinja",), mutate_template, read_tokenizer("chat"))
      for n in ("chat_template", "additional_chat_templates/tool_use")),
    Target((f"{COMMIT}/manifest.json",), mutate_state, read_checkpoint),
    Target((f"{COMMIT}/state.json", f"{COMMIT}/model.safetensors"), mutate_bytes, read_checkpoint),
    Target(("run.json",), mutate_json, read_settings("run.json")),
    Target(("run.toml",), mutate_toml, read_settings("run.toml")),
    Target(("grpo.json",), mutate_json, read_settings("grpo.json", GRPOConfig)),
)


def fuzz_case(root: Path, index: int) -> tuple[str, Callable[[], object]]:
    """(file, what opens it) of a case; the file has been changed by then, and only it."""
    rng = random.Random(index)
    target = TARGETS[index % len(TARGETS)]
    name = rng.choice(target.files)
    path, backup = root / name, root / "right" / name
    if not backup.exists():
        backup.parent.mkdir(parents=True, exist_ok=True)
        backup.write_bytes(path.read_bytes())
    data = backup.read_bytes()
    other = target.mutate is mutate_safetensors and name.endswith(".json")
    mutate = mutate_json if other else target.mutate
    path.write_bytes(mutate(data, rng))

    def read() -> None:
        try:
            target.load(root)
        finally:
            path.write_bytes(data)

    return name, read


def fuzz(root: Path, cases: range) -> list[Finding]:
    """Findings of a range of cases, in a folder of their own."""
    make_world(root)
    with suppress(UserError):  # loads the hub's library, which a base of that name asks
        resolve("owner/name")
    for target in TARGETS:  # every right file is read, and every library loaded, before children
        target.load(root)
    return run_cases(cases, lambda index: fuzz_case(root, index), root)


if __name__ == "__main__":
    first, *rest = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as made:
        found = fuzz(Path(made), range(first, rest[0] if rest else first + 1))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(*found, f"{len(found)} findings, {seconds:.1f} s of CPU time in children", sep="\n")
    sys.exit(bool(found))
