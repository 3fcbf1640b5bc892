"""What a page of documentation holds: blocks of code, commands, links; and a world to run them in.

A page is a README: the front door, or the one of a wing beside its code.
"""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

from minirlhf import streams
from minirlhf.cli import VERBS
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.models.pretrained import save_pretrained
from minirlhf.models.transformer import CausalLM, ModelConfig, initialize
from minirlhf.run import flags

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", *sorted((ROOT / "minirlhf").rglob("README.md")),
                 *sorted((ROOT / "benchmarks").glob("**/README.md")))
]
MODEL = "real/SmolLM2-135M-Instruct"  # as benchmarks/prepare.py calls it
ALWAYS = {"--config", "--preset", "--explain-preset", "--help", "--help-all", "--version"}


def read(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path | str, language: str) -> list[str]:
    fence = rf"^```{language}(?: \w+)?\n(.*?)^```"
    return re.findall(fence, read(page), re.DOTALL | re.MULTILINE)


def inline(page: Path | str) -> list[str]:
    """What stands in backticks within a line, and outside of blocks."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def links(page: Path | str) -> list[str]:
    """Targets of links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", read(page)) + re.findall(r'src="([^"]+)"', read(page))
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as links to them spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path | str) -> list[list[str]]:
    """The words of each command of a page's shell blocks; a `for` loop's body once."""
    found = []
    for block in blocks(page, "bash"):
        for name, first in re.findall(r"for (\w+) in (\S+)", block):
            block = block.replace(f"${name}", first)
        block = re.sub(r"for \w+ in [^;]*; do|; done", "", block.replace("\\\n", " "))
        for line in block.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
            lexer.whitespace_split, words = True, []
            for word in [*lexer, ";"]:
                if set(word) <= set(";|&<>"):
                    found.append(words)
                    words = []
                elif words or not re.fullmatch(r"[A-Z_]+=\S*", word):  # OMP_NUM_THREADS=1
                    words.append(word)
    return [words for words in found if words]


def script_source(script: str) -> str:
    """A script's text, and that of the scripts beside it that it imports."""
    text, folder = read(script), (ROOT / script).parent
    beside = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    files = [folder / f"{name}.py" for name in beside]
    return "\n".join([text, *(file.read_text("utf-8") for file in files if file.is_file())])


def parse(verb: str, words: list[str]) -> None:
    """Reads a command's settings as its verb does, and runs nothing."""
    if VERBS[verb].settings:
        flags.parse(VERBS[verb].config(), words, f"minirlhf {verb}")


def all_flags() -> set[str]:
    """Every flag of every verb."""
    names = {field.name for verb in VERBS.values() if verb.settings
             for field in fields(verb.config())}
    names = {name.replace("_", "-") for name in names}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | ALWAYS


# ------------------------------------------------------------------------------------ a small world


def make_model(folder: Path) -> None:
    """A tiny model under the name of the real one."""
    tokenizer = train_tokenizer(["a film that works", "the plot is thin"] * 4, 280, folder)
    source = {"model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 16,
              "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
              "eos_token_id": tokenizer.eos_ids[0], "tie_word_embeddings": True}
    config = ModelConfig(
        family="llama", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
        num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, max_positions=128, source=source,
    )
    save_pretrained(initialize(CausalLM(config), streams.generator(0, "readme")), folder)


def make_world(folder: Path) -> None:
    """What benchmarks/prepare.py would write, small: a tiny model, prompts and pairs."""
    make_model(folder / MODEL)
    texts = ("a film", "the plot", "a plot that")
    write(folder / "real" / "movie_prompts.jsonl", [{"prompt": text} for text in texts])
    pairs = [{"chosen": f"{text} works", "rejected": f"{text} is thin", "margin": 1.0}
             for text in texts]
    for part in ("train", "eval"):
        write(folder / "real" / f"movie_pairs_{part}.jsonl", pairs)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_code(code: str, names: dict) -> dict:
    exec(compile(code, "README.md", "exec"), names)
    return names
