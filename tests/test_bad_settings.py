"""Flags, config files and command lines that cannot be meant, and in which order all is checked."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from minirlhf.cli import VERBS
from minirlhf.errors import UserError
from minirlhf.run.flags import parse
from minirlhf.run.folder import Run
from minirlhf.run.settings import as_dict
from tests import bad_inputs
from tests.bad_inputs import COMMANDS, PAIR, PROMPT, TEXT, json_lines, named, words
from tests.kill_harness import RECIPES
from tests.tiny_folders import change_json

world, refused = bad_inputs.world, bad_inputs.refused

CONFIGS = {verb: VERBS[verb].config() for verb in (*RECIPES, "sample", "score")}

# ---- one flag ------------------------------------------------------------------------------------

WHOLE = "must be a whole number >= 1 or none"
DTYPES = "must be one of auto, float32, bfloat16"
FLAGS = [  # added to a right `minirlhf sft`, what is told
    ("--steps 1e3", f"--steps: got '1e3', {WHOLE}"),
    ("--steps 0", f"--steps: got 0, {WHOLE}"),
    ("--steps=", f"--steps: got '', {WHOLE}"),
    (f"--steps {'9' * 5000}", "--steps: got '99999"),
    ("--steps", "--steps: expected one value"),
    ("--steps --resume", "--steps: expected one value"),
    ("--step 3", "--step: unknown flag: the nearest is --steps"),  # no abbreviation
    ("--steps 1 --steps 2", "--steps: given twice"),
    ("--batch_size 2 --batch-size 3", "--batch-size: given twice"),
    ("--learning-rate nan", "--learning-rate: got nan, must be a finite number > 0"),
    ("--learning-rate 1e-400", "--learning-rate: got 0.0, must be a finite number > 0"),
    ("--epochs none", "--epochs: got 'none', must be a finite number > 0"),
    ("--seed 99999999999999999999", "--seed: got 99999999999999999999, must be a whole number of"),
    ("--dtype fp16", f"--dtype: got 'fp16', {DTYPES}"),
    ("--device gpu", "--device: 'gpu' cannot be used ("),
    ("--device cuda:99", "--device: 'cuda:99' cannot be used ("),
    ("--device ''", "--device: '' cannot be used ("),
    ("--template-kwargs x", "template_kwargs: got 'x', must be NAME=VALUE, as in x=false"),
    ("--template-kwargs x=1 x=2", "template_kwargs: two for x"),
    ("--template-kwargs eos_token=x", "template_kwargs: eos_token is set by the renderer"),
    ("--template-kwargs tools=[]", "template_kwargs: tools is a column of its own"),
    ("--columns", "--columns: expected at least one value"),
    ("--columns question", "columns: got 'question', must be NAME=COLUMN, as in prompt=question"),
    ("--columns prompt=", "columns: got 'prompt=', must be NAME=COLUMN, as in prompt=question"),
    ("--columns promt=question", "columns: no 'promt' is read: the nearest is prompt"),
    ("--columns question=prompt", "columns: no 'question' is read: our name comes first: "),
    ("--columns text=a text=b", "columns: two for text: a and b"),
    ("--columns prompt=a completion=a", "columns: 'a' is given for two names"),
    ("--columns text=a=b", "texts.jsonl:1: no column 'a=b' to take as text: keys present: text"),
    ("--eval-data ''", "--eval-data: got '', must be the name of a file"),
    ("--eval-data a=", "''"),
    ("--eval-data texts.jsonl texts.jsonl", "--eval-data: two sets are called 'eval': name each"),
    ("--resume --no-resume", "--no-resume: given twice"),
    ("--resume -3", "minirlhf sft: unexpected argument '-3'"),
    ("--resume yes", "minirlhf sft: unexpected argument 'yes'"),
    ("--resume=true", "--resume: got 'true', takes no value: give --resume or --no-resume"),
    ("--no-resume=1", "--no-resume: got '1', takes no value: give --resume or --no-resume"),
    ("--lr 1e-5", "--lr: unknown flag: the nearest is --learning-rate"),
    ("-steps 3", "minirlhf sft: unexpected argument '-steps': the nearest is --steps; "),
    ("–steps=3", "minirlhf sft: unexpected argument '–steps=3': the nearest is --steps"),
    ("---steps 3", "---steps: unknown flag: the nearest is --steps"),
    ("-- 3", "--: unknown flag: "),
    ("extra", "minirlhf sft: unexpected argument 'extra'"),
    ("--init-config shape.json", "give exactly one of --model and --init-config"),
    ("--eval-every 5", "eval_every: goes with --eval-data"),
    ("--tokenizer lm", "--tokenizer goes with --init-config: a --model has its own"),
    ("--config", "--config: expected one value"),
    ("--config nowhere.toml", "nowhere.toml: no such file"),
    ("--config texts.jsonl", "texts.jsonl: --config reads .toml, .json, .yaml, .yml files only"),
]
PPO_FLAGS = [  # added to a right `minirlhf ppo`, what is told
    ("--kl-in loss", "kl_in loss with kl_estimator k1: the gradient of that estimate"),
    ("--max-prompt-length 3", "prompts.jsonl:1: 8 tokens, max_length is 3"),
    ("--eval-data a", "a: not a data file: its name has no ending"),
    ("--eval-every 5", "eval_every: goes with --eval-data"),
    ("--keep-best --eval-data prompts.jsonl", "keep_best: goes with --eval-every, the policy at"),
    ("--keep-best", "keep_best: goes with --eval-data"),
    ("--eval-prompts 2", "eval_prompts: goes with --eval-data"),
]


@pytest.mark.parametrize(("flags", "told"), named(FLAGS))
def test_a_bad_flag_is_refused_by_its_name(flags, told, refused):
    given = words("sft", steps=None) if "steps" in flags else words("sft")
    assert refused(given + shlex.split(flags)).startswith(told)


@pytest.mark.parametrize(("flags", "told"), named(PPO_FLAGS))
def test_a_bad_flag_of_ppo_is_refused_by_its_name(flags, told, refused):
    assert refused(words("ppo") + shlex.split(flags)).startswith(told)


# ---- one command line ----------------------------------------------------------------------------

SFT = "sft --model lm --data texts.jsonl"
PPO = "ppo --model lm --data prompts.jsonl --out out --batch-size 2 --micro-batch-size 2 " \
    "--max-new-tokens 4 --reward"
NO_FOLDER = "no such folder: give a model folder or a hub name (owner/name)"
LINES = [  # a command line, what is told
    ("SFT", "minirlhf SFT: no such verb: the nearest is sft; verbs: sft, reward, ppo, "),
    ("rewrad", "minirlhf rewrad: no such verb: the nearest is reward"),
    ("-v", "minirlhf -v: no such verb: the nearest is --version"),
    ("sft", "--data: required, but not given; --out: required, but not given"),
    ("reward", "--model: required, but not given; --data: required, but not given; --out: requi"),
    ("ppo", "--model: required, but not given; --data: required, but not given; --reward: req"),
    ("sample", "--model: required, but not given"),
    ("score --model rm", "--data: required, but not given"),
    ("sample --model lm", "give exactly one of --data and --prompt"),
    ("sample --model lm --data prompts.jsonl --prompt a", "give exactly one of --data and --promp"),
    ("sample --model lm --prompt '' --max-new-tokens 4", "--prompt: has 0 tokens: must have 1 to"),
    (f"sample --model lm --prompt {'a' * 46} --max-new-tokens 4", "--prompt: has 46 tokens: must "),
    ("sample --model lm --prompt a --stop ''", "stop: got an empty string, which every text cont"),
    ("sample --model lm --prompt a --max-new-tokens 49", "--max-new-tokens: is 49: the model has "),
    ("sample --model lm --data prompts.jsonl --max-new-tokens 4 --max-length 99",
     "--max-length: is 99, the model has room for 45 before the new tokens"),
    ("sample --model lm --prompt a --out texts.jsonl", "--out: texts.jsonl is there already: give"),
    ("sample --model lm --prompt a --samples 2 --temperature 0 --max-new-tokens 4",
     "--samples 2 with temperature 0: they would all be one"),
    ("sample --model lm --prompt a --temperature 1e-300", "--temperature 1e-300: 0, or at least"),
    ("sample --model rm --prompt a --max-new-tokens 4", "rm: is a reward model, not a lang"),
    ("sample --model texts.jsonl --prompt a --max-new-tokens 4", "texts.jsonl: is a file: give"),
    ("sample --model lm --data prompts.jsonl --max-new-tokens 4 --max-length 1", "prompts.jsonl:1"),
    ("score --model rm --data texts.jsonl --max-length 2", "texts.jsonl:1: "),
    ("score --model rm --data pairs.jsonl --max-length 99", "--max-length: is 99: the model has 4"),
    ("score --model rm --data pairs.jsonl --out rm", "--out: rm is there already: give another"),
    ("sft --data texts.jsonl --out out", "give exactly one of --model and --init-config"),
    (f"{SFT}", "--out: required, but not given"),
    (f"{SFT} --out texts.jsonl", "texts.jsonl: is not a folder: give another --out"),
    (f"{SFT} --out lm", "lm: is --model lm or lies in it: give another --out"),
    (f"{SFT} --out lm --resume", "lm: is --model lm or lies in it: give another --out"),
    (f"{SFT} --out reward.py/out", "reward.py/out: reward.py is a file: give another --out"),
    ("sample --model lm --prompt a --max-new-tokens 4 --out no/where", "--out: no is no folder"),
    ("score --model rm --data pairs.jsonl --out no/where", "--out: no is no folder"),
    ("sft --model lm --data lm --out out", "lm: a folder: legal: .jsonl .json .csv .tsv"),
    ("sft --model texts.jsonl --data lm --out out", "texts.jsonl: is a file: give the folder that"),
    ("sft --model rm --data texts.jsonl --out out", "rm: is a reward model, not a language model"),
    ("sft --model lm/config.json --data texts.jsonl --out out", "lm/config.json: is a file: give"),
    ("sft --model nowhere --data texts.jsonl --out out", f"nowhere: {NO_FOLDER}"),
    ("sft --model https://huggingface.co/a/b --data texts.jsonl --out out",
     f"https://huggingface.co/a/b: {NO_FOLDER}"),
    ("sft --init-config lm --data texts.jsonl --out out", "lm: a folder: give a regular file"),
    ("sft --init-config nowhere.json --data texts.jsonl --out out", "nowhere.json: no such file"),
    ("sft --init-config texts.jsonl --data texts.jsonl --out out", "texts.jsonl:2: not valid JSON"),
    ("sft --init-config shape.json --tokenizer nowhere --data texts.jsonl --out out",
     "nowhere: no such folder: give a model folder or a hub name"),
    ("sft --init-config shape.json --lora-rank 4 --data texts.jsonl --out out",
     "--lora-rank goes with --model: random weights need training in full"),
    ("sft --model lm --trunk-bits 4 --data texts.jsonl --out out",
     "trunk_bits: got 4, but packed weights cannot be trained: give --lora-rank too, 16 for a "
     "start"),
    ("sft --model lm --trunk-bits 3 --data texts.jsonl --out out",
     "--trunk-bits: got 3, must be one of 0, 8, 4"),
    ("sft --init-config lm/config.json --tokenizer other --data texts.jsonl --out out",
     "lm/config.json: vocab_size: is 258: must be at least the tokenizer's 260"),
    ("demo --scale 2", "--scale: got 2.0, must be a finite number > 0 and <= 1"),
    ("demo --out lm", "lm: is there already: remove it, or give another --out"),
    (f"{PPO} nowhere.py:f", "--reward: nowhere.py does not exist: give file.py:function"),
    (f"{PPO} reward.py", "--reward: reward.py names no function: give reward.py:function"),
    (f"{PPO} reward.py:", "--reward reward.py: has no function '': it has: length"),
    (f"{PPO} reward.py:number", "--reward reward.py: has no function 'number': it has: length"),
    (f"{PPO} texts.jsonl", "texts.jsonl: is a file: give the folder that holds config.json"),
    (f"{PPO} texts.jsonl:f", f"texts.jsonl:f: {NO_FOLDER}"),
    (f"{PPO} localhost:1", f"localhost:1: {NO_FOLDER}"),
    (f"{PPO} ftp://localhost:1", "--reward ftp://localhost:1: ftp:// is no scheme of a service"),
    (f"{PPO} rm format", "--reward format: says too little: give format:REGEX"),
    (f"{PPO} '0.5*format:(a'", "--reward format:(a: no regex: missing ), unterminated subpattern"),
    (f"{PPO} length:0", "--reward length:0: '0' is no length: give length:N"),
    (f"{PPO} math 2*math", "--reward: math stands twice: give each source once"),
    (f"{PPO} math", "prompts.jsonl:1: no column answer, which --reward math needs; beside the "),
    (f"{PPO} rm two*reward.py:length", "--reward: two*reward.py:length: the weight is 'two': a"),
    (f"{PPO} rm 0.5*rm", "--reward: rm stands twice: give each source once"),
    (f"{PPO} 0*rm", "reward: all weights are 0; give one source that counts"),
    (f"{PPO} rm --reward-retries 2", "reward-retries: is for a service; no --reward is http://"),
    (f"{PPO} http://localhost:1 --reward-token-file no", "no: no such file"),
]


@pytest.mark.parametrize(("line", "told"), named(LINES))
def test_a_bad_command_line_is_refused(line, told, refused):
    assert refused(shlex.split(line)).startswith(told)


def test_an_output_folder_inside_the_model_is_refused(refused, world):
    shutil.copytree(world / "lm", "own")
    line = refused(words("sft", model="own", out="own/out"))
    assert line.startswith("own/out: is --model own or lies in it: give another --out")


BROKEN_CODE = [  # content of the file of --reward, what is told
    ("def length(:\n", "bad.py:1: bad.py raised SyntaxError: "),
    ("import nothing_of_this_name\n", "bad.py:1: bad.py raised ModuleNotFoundError: No module"),
    ("\n1 / 0\n", "bad.py:2: bad.py raised ZeroDivisionError: division by zero"),
    ("print(undefined)\n", "bad.py:1: bad.py raised NameError: name 'undefined' is not def"),
    ("", "--reward bad.py: has no function 'length': it has: none"),
]


@pytest.mark.parametrize(("code", "told"), named(BROKEN_CODE))
def test_a_reward_function_that_does_not_load_is_refused_by_its_line(code, told, refused):
    Path("bad.py").write_text(code, encoding="utf-8")
    assert refused(words("ppo", reward="bad.py:length")).startswith(told)


# ---- one file of settings ------------------------------------------------------------------------

RIGHT = {"model": "lm", "data": "texts.jsonl", "out": "out"}
SECTIONS = "is a table: settings stand at the top of the file, in no section"
TOML = [  # added to a right file, what is told behind its name
    ("steps = 0", f"steps: got 0, {WHOLE}"),
    ("lr = 1", "lr: unknown setting: the nearest is learning_rate"),
    ("learning-rate = 1e-3\nlearning_rate = 1e-3", "learning_rate: given twice"),
    ("[train]\nsteps = 1", f"train: {SECTIONS}"),
    ("[steps]\nlast = 1", f"steps: {SECTIONS}"),
    ("steps = 1\nsteps = 2", "not valid TOML: "),
    ("model = lm", "not valid TOML: "),
    ("learning_rate = inf", "learning_rate: got inf, must be a finite number > 0"),
    ("seed = 2026-01-01", "seed: got 2026-01-01, must be a whole number"),
    ("eval_data = 1", "eval_data: got 1, must be text or a list of text"),
    ("eval_data = ''", "eval_data: got '', must be the name of a file"),
    ("eval_data = ['']", "eval_data: got '', must be the name of a file"),
    ('tokenizer = "a\\u0000b"', "tokenizer: got 'a\\x00b', must be text or none"),
]
JSON = [  # content of a file, what is told behind its name
    ("", ":1: not valid JSON at column 1: Expecting value"),
    ("null", ": holds none: must be an object of settings"),
    ("[]", ": holds []: must be an object of settings"),
    ("{", ":1: not valid JSON at column 2: Expecting property name"),
    ('{"steps": 1,\n}', ":2: not valid JSON at column 1: Expecting property name"),
    ('{"steps": 1, "steps": 2}', ":1: key 'steps' stands twice in one object"),
    ('{"learning_rate": NaN}', ":1: NaN is not JSON"),
    ('{"steps": ' + "9" * 5000 + "}", ":1: an integer of thousands of digits"),
    ('{"model": "\\ud800"}', ":1: half of a surrogate pair"),
    (" " * (2**16 + 1), ": larger than 65,536 bytes"),
    ('{"a": ' * 2000, ":1: nested deeper than 64 levels"),
    ("<html>", ":1: not valid JSON at column 1: it looks like a web page"),
    ('{"stepz": 1}', ": stepz: unknown setting: the nearest is steps; --data: required"),
    ('{"recipe": "sft"}', ": recipe: unknown setting: the settings are the flags th"),
    (json.dumps(RIGHT | {"epochs": None}), ": epochs: got none, must be a finite number > 0"),
    (json.dumps(RIGHT | {"learning_rate": 10**400}), ": learning_rate: got 10000"),
    (json.dumps(RIGHT | {"data": 3}), ": data: got 3, must be text"),
    (json.dumps(RIGHT | {"train": {"steps": 1}}), f": train: {SECTIONS}"),
    (json.dumps(RIGHT | {"steps": "x", "keep": []}), f": steps: got 'x', {WHOLE}; c.json: keep: g"),
    (b'{"model": "\xff"}', ": not UTF-8 at byte 11: save the file as UTF-8"),
    (json.dumps(RIGHT).encode("utf-16"), ": not UTF-8 at byte 0: it looks like UTF-16"),
]


@pytest.mark.parametrize(("added", "told"), named(TOML))
def test_a_bad_toml_file_is_refused_by_its_key(added, told, refused):
    right = "".join(f'{name} = "{value}"\n' for name, value in RIGHT.items())
    Path("c.toml").write_text(right + added + "\n", encoding="utf-8")
    assert refused(["sft", "--config", "c.toml"]).startswith(f"c.toml: {told}")


@pytest.mark.parametrize(("content", "told"), named(JSON))
def test_a_bad_json_file_of_settings_is_refused_by_line_or_key(content, told, refused):
    Path("c.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(["sft", "--config", "c.json"]).startswith(f"c.json{told}")


# ---- every setting -------------------------------------------------------------------------------

SHOWN = 20  # problems that one line tells
NOT_TEXT = ("\udcff", "a\0b")
BAD_WORDS = {
    int: ("1.5", "1e3", "ten", "−1", "1__0", "٣"), str: NOT_TEXT,
    float: ("nan", "-inf", "1,5", "1e-5x", "1e999"),
}
BAD_VALUES = {
    int: (1.5, 3.0, "1", True, [1], 2**63), float: ("0.1", True, [0.1], "nan"),
    str: (3, True, ["a"], "a\0b"), bool: (1, "yes", None, "true"), tuple: ("a\0b", [1], [None], 3),
}
BEYOND = {">=": -1, ">": 0, "<=": 1, "<": 0}  # from a limit to the nearest whole step outside it


def kind(field: dataclasses.Field) -> type:
    return next((t for t in (bool, int, float, str) if field.type in (t, t | None)), tuple)


def bad_words(field: dataclasses.Field) -> tuple[str, ...]:
    """What no flag of this type takes, and what lies outside its limits and choices."""
    rule = field.metadata
    outside = [f"{limit + BEYOND[sign]}" for sign, limit in rule["limits"].items()]
    unlike = [word for choice in (rule["choices"] or ())[:1]
              for word in ("", f"{choice}9", str(choice).upper() + "9" * (kind(field) is int), " ")]
    empty = [""] if rule["metavar"] in ("FILE", "FOLDER", "DIR", "SOURCE") else []
    return (*BAD_WORDS.get(kind(field), ()), *outside, *unlike, *empty)


def chunks(items: list) -> list[list]:
    return [items[i : i + SHOWN] for i in range(0, len(items), SHOWN)]


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_misspelt_flag_is_told_the_right_one(verb, refused):
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(CONFIGS[verb])]
    for chunk in chunks(flags):
        wrong = [flag[:3] + "q" + flag[4:] for flag in chunk]  # its second letter
        told = [f"{w}: unknown flag: the nearest is {f}" for w, f in zip(wrong, chunk, strict=True)]
        assert refused([verb, *wrong]).split("; ") == told


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_misspelt_key_of_a_file_is_told_the_right_one(verb, refused):
    names = [field.name for field in dataclasses.fields(CONFIGS[verb])]
    for chunk in chunks(names):
        wrong = [name[0] + "q" + name[2:] for name in chunk]
        Path("c.json").write_text(json.dumps(dict.fromkeys(wrong, 1)), encoding="utf-8")
        line = refused([verb, "--config", "c.json"])
        for right, name in zip(chunk, wrong, strict=True):
            assert f"c.json: {name}: unknown setting: the nearest is {right}" in line


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_flag_refuses_what_is_not_of_its_type_or_range(verb, refused):
    table = {field.name: bad_words(field) for field in dataclasses.fields(CONFIGS[verb])}
    for column in range(max(map(len, table.values()))):
        bad = {name: texts[column] for name, texts in table.items() if column < len(texts)}
        for chunk in chunks(list(bad)):
            argv = words(verb, **dict.fromkeys(chunk))
            flags = {name: "--" + name.replace("_", "-") for name in chunk}
            line = refused(argv + [f"{flags[name]}={bad[name]}" for name in chunk])
            assert all(f"{flag}: got " in line for flag in flags.values()), line


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_key_of_a_file_refuses_what_is_not_of_its_type(verb, refused):
    fields = dataclasses.fields(CONFIGS[verb])
    for column in range(max(map(len, BAD_VALUES.values()))):
        bad = {field.name: BAD_VALUES[kind(field)] for field in fields}
        bad = {name: values[column] for name, values in bad.items() if column < len(values)}
        for chunk in chunks(list(bad)):
            values = json.dumps({name: bad[name] for name in chunk})
            Path("c.json").write_text(values, encoding="utf-8")
            argv = [*words(verb, **dict.fromkeys(chunk)), "--config", "c.json"]
            line = refused(argv)
            assert all(f"c.json: {name}: got " in line for name in chunk), line


# ---- settings of a run that is resumed -----------------------------------------------------------


def another(field: dataclasses.Field, value: object) -> object:
    """A legal value of a setting that is not the given one."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    changed = {bool: lambda: not value, int: lambda: (value or 1) + 1, str: lambda: f"{value}x",
               float: lambda: (value or 1.0) / 2, tuple: lambda: (*value, "x")}
    return changed[kind(field)]()


EVERYWHERE = {"out", "resume", "resume_from", "log_every", "save_every", "keep", "device", "merge",
              "allow_data_change", "allow_setting_change", "gradient_checkpointing", "dry_run",
              "verbose", "quiet", "json", "track", "parallel", "offload_params", "rank_timeout"}
WEIGHTS = {"model", "base", "lora_rank", "lora_alpha", "lora_targets", "rslora", "dora",
           "trunk_bits", "dtype"}  # a checkpoint's are of them
ROWS = {"seed", "overlong", "columns", "bad_rows", "fix_text", "allow_empty_prompt", "chat",
        "template_kwargs", "rendered", "spelled"}
PLACE = ROWS | {"batch_size", "max_length"}  # sft and reward count their place in these rows
FREE = {  # what no number depends on, save that a device has its own last bits
    "sft": EVERYWHERE, "reward": EVERYWHERE | {"show_samples"},
    "dpo": EVERYWHERE | {"show_samples", "cache_ref"},
    **dict.fromkeys(("ppo", "grpo"), EVERYWHERE | {
        "reward_timeout", "reward_connect_timeout", "reward_retries", "reward_batch_size",
        "reward_token_file", "offload_frozen",
    }),
    "distill": EVERYWHERE,
}
FIXED = {
    "sft": WEIGHTS | PLACE | {"init_config", "tokenizer", "vocab_size", "train_on"},
    "reward": WEIGHTS | PLACE | {"heads"},
    "dpo": WEIGHTS | PLACE | {"ref"},
    "ppo": WEIGHTS | {"ref", "critic", "train_critic", "eval_data", "eval_prompts"},
    "grpo": WEIGHTS | {"ref", "eval_data", "eval_prompts"},
    "distill": WEIGHTS | {"teacher", "eval_data", "eval_prompts"},
}
SAMPLED = ROWS | {  # evaluations compare with those of the start
    "stop", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "min_new_tokens",
    "max_prompt_length",
}
COMPARED = SAMPLED | {"reward", "reward_format", "keep_best"}


@pytest.mark.parametrize(
    ("verb", "changes", "more"),
    [
        *((verb, {}, set()) for verb in RECIPES),
        ("ppo", {"eval_data": ("held.jsonl",)}, COMPARED),
        ("grpo", {"eval_data": ("held.jsonl",)}, COMPARED),
        ("ppo", {"kl_target": 6.0}, {"kl_coef"}),
        ("distill", {"eval_data": ("held.jsonl",)}, SAMPLED),
    ],
)
def test_a_resumed_run_changes_what_is_free_and_no_more_without_leave(
    verb, changes, more, tmp_path
):
    config = parse(CONFIGS[verb], words(verb, out=str(tmp_path))[1:], verb)
    config = dataclasses.replace(config, resume=True, **changes)
    facts = {"recipe": verb, "settings": as_dict(config)}
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    for field in dataclasses.fields(config):
        if field.name in ("out", "resume"):  # with another, there is no run to go on with
            continue
        now = dataclasses.replace(
            config, **{field.name: another(field, getattr(config, field.name))}
        )
        if field.name in FREE[verb]:
            Run(now, verb)
            continue
        with pytest.raises(UserError) as caught:
            Run(now, verb)
        old, new = (as_dict(c)[field.name] for c in (config, now))
        assert caught.value.what == f"{field.name} was {old!r}, is {new!r}"
        do = "resume with the settings of the first start"
        if field.name in FIXED[verb] | more:
            assert caught.value.do == do
        else:
            assert caught.value.do == f"{do}, or --allow-setting-change"
            Run(dataclasses.replace(now, allow_setting_change=True), verb)


NOT_OURS = "out/run.json: is not of a sft run: give another --out"
RUN_JSON = [  # content of run.json in the folder of --out, what is told
    ("", "out/run.json:1: not valid JSON at column 1: Expecting value"),
    ("[]", NOT_OURS),
    ('{"recipe": "ppo", "settings": {}}', NOT_OURS),
    ('{"recipe": "sft"}', "out/run.json: has no settings: give another --out"),
    ('{"recipe": "sft", "settings": {"model": "rm"}}', "out/run.json: model was 'rm', is 'lm': "),
    ('{"recipe": "sft", "settings": {}, "inputs": []}', "out/run.json: has no list of its inputs"),
    ('{"recipe": "sft", "settings": {}, "data_changes": 1}', "out/run.json: has no list of its in"),
]


@pytest.mark.parametrize(("content", "told"), named(RUN_JSON))
def test_a_run_that_cannot_be_resumed_is_refused(content, told, refused):
    Path("out").mkdir()
    Path("out/run.json").write_text(content, encoding="utf-8")
    assert refused([*words("sft"), "--resume"]).startswith(told)


# ---- in which order ------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a command that begins to load weights."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded before all else is checked")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load)


def bad_last_row(verb: str) -> str:
    of_prompts = dict.fromkeys(("ppo", "grpo", "distill", "sample"), PROMPT)
    row = {"sft": TEXT, "new": TEXT, **of_prompts}.get(verb, PAIR)
    Path("late.jsonl").write_text(json_lines(*[row] * 50, {}), encoding="utf-8")
    return "late.jsonl"


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_last_row_is_read_before_any_weight(verb, refused, no_weights):
    line = refused(words(verb, data=bad_last_row(verb)))
    assert line.startswith("late.jsonl:51: ")


@pytest.mark.parametrize("verb", ["sft", "new", "reward", "dpo", "ppo", "grpo", "distill"])
def test_the_last_held_out_row_is_read_before_any_weight(verb, refused, no_weights):
    good = COMMANDS[verb].partition("--data ")[2].split()[0]
    line = refused(words(verb, eval_data=(f"a={good}", bad_last_row(verb))))
    assert line.startswith("late.jsonl:51: ")


@pytest.mark.parametrize("verb", RECIPES)
@pytest.mark.parametrize(
    ("out", "told"), [("full", "is not empty: give another"), ("reward.py", "is not a folder")]
)
def test_the_output_folder_is_looked_at_before_any_weight(verb, out, told, refused, no_weights):
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine", encoding="utf-8")
    assert refused(words(verb, out=out)).startswith(f"{out}: {told}")


NEEDS = "def f(completions, rating):\n    return [0.0 for _ in completions]\n"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward": "nowhere"}, "nowhere: no such folder"),
        ({"reward": "reward.py:nothing"}, "--reward reward.py: has no function 'nothing'"),
        ({"reward": "lm"}, "lm: has no 'score.weight': not a reward model"),
        ({"ref": "nowhere"}, "nowhere: no such folder"),
        ({"ref": "other-lm"}, "--ref other-lm: has another tokenizer than the policy"),
        ({"critic": "nowhere"}, "nowhere: no such folder"),
        ({"critic": "other"}, "--critic other: has another tokenizer"),
        ({"critic": "lm"}, "lm: has no 'score.weight'"),
        ({"ref": "rm"}, "rm: is a reward model, not a language model"),
        ({"model": "rm"}, "rm: is a reward model, not a language"),
    ],
)
def test_every_model_of_ppo_is_looked_at_before_any_weight(changes, told, refused, no_weights):
    assert refused(words("ppo", **changes)).startswith(told)


def test_a_column_that_the_reward_needs_is_looked_for_before_any_weight(refused, no_weights):
    Path("needs.py").write_text(NEEDS, encoding="utf-8")
    line = refused(words("ppo", reward="needs.py:f"))
    told = "prompts.jsonl:1: needs.py:f needs rating, which no prompt has: there are prompts, "
    assert line.startswith(told)


def test_held_out_prompts_need_the_reward_s_columns_before_any_weight(refused, no_weights):
    Path("needs.py").write_text(NEEDS, encoding="utf-8")
    Path("rated.jsonl").write_text(json_lines(PROMPT | {"rating": 1}, PROMPT), encoding="utf-8")
    Path("held.jsonl").write_text("\n" + json_lines(PROMPT | {"rated": 1}) * 2, encoding="utf-8")
    held = ("rated=rated.jsonl", "held=held.jsonl")
    line = refused(words("ppo", reward="needs.py:f", data="rated.jsonl", eval_data=held))
    told = "held.jsonl:2: needs.py:f needs rating, which no prompt has: there are rated, prompts"
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("source", "room", "told"),
    [
        # "The film" has 8 tokens, and 4 are sampled
        ("other", 12,
         "held.jsonl:2: 9 tokens as --reward narrow reads them, 4 new: it reads 12: "
         "lower --max-new-tokens, or leave such prompts out by --overlong drop"),
        ("rm", 6, "prompts.jsonl:1: 8 tokens"),
    ],
    ids=["re-encodes", "same tokenizer"],
)
def test_the_room_of_the_reward_model_is_looked_at_before_any_weight(
    source, room, told, refused, no_weights, world
):
    narrow = Path("narrow")
    shutil.copytree(world / source, narrow)
    change_json(narrow / "config.json", max_position_embeddings=room)
    Path("held.jsonl").write_text(json_lines(PROMPT, {"prompt": "!" * 9}), encoding="utf-8")
    assert refused(words("ppo", reward="narrow", eval_data="held.jsonl")).startswith(told)
