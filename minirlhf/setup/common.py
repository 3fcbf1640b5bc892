"""What the recipes share before their loops and after them: held-out files, the finished model."""

from pathlib import Path

from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files import atomic, folders
from minirlhf.files.reading import read_json
from minirlhf.models import pretrained
from minirlhf.models.peft_files import save_adapter
from minirlhf.models.transformer import CausalLM
from minirlhf.setup.adapter_settings import dropout_in
from minirlhf.setup.groups import ModelSettings


def named_files(entries: tuple[str, ...], mark: str = "_") -> dict[str, str]:
    """`FILE` or `NAME=FILE`, several -> {metric prefix: file}; `mark` ends its parts."""
    out = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not equals or Path(entry).exists():
            name, file = "", entry
        prefix = f"eval{mark}{name}{mark}" if name else f"eval{mark}"
        if prefix in out:
            raise UserError("--eval-data", f"two sets are called {name or 'eval'!r}",
                            "name each: --eval-data short=a.jsonl long=b.jsonl")
        out[prefix] = file
    return out


def check_base(config: ModelSettings, *models: Path) -> None:
    """Refuses a --base where none of the models is an adapter."""
    if config.base is not None and not any(isinstance(m, folders.AdapterFolder) for m in models):
        raise UserError("--base", "is given, but no model here is an adapter", "leave it out")


def base_name(config: ModelSettings) -> str:
    """What an adapter of a run says of its base: the name that --model gives, or the base of the
    adapter that it gives. A path stands as it was given, and is found again from the same working
    directory, or from wherever the adapter lies below it."""
    folder = folders.resolve(config.model, False, config.base)
    if isinstance(folder, folders.AdapterFolder):
        return folder.base_name
    return folders.name_of(config.model, folder)


def write_adapter(
    lm: CausalLM, tokenizer: Tokenizer, config: ModelSettings, folder: Path
) -> None:
    """A folder that peft loads: adapters, tokenizer, generation config."""
    save_adapter(lm, folder, base_name(config), dropout_in(config))
    _write_text_files(lm, tokenizer, folder)


def use_of_adapter(folder: Path, base: str, heads: int = 0) -> list[str]:
    """Who else reads an adapter, and how; of a reward model with its number of heads."""
    auto = "AutoModelForSequenceClassification" if heads else "AutoModelForCausalLM"
    load = f"{auto}.from_pretrained('{base}'{f', num_labels={heads}' if heads else ''})"
    lines = [f"peft: PeftModel.from_pretrained({load}, '{folder}')"]
    return lines if heads else [
        *lines, f"vllm serve {base} --enable-lora --lora-modules adapter={folder}",
        f"llama.cpp: python convert_lora_to_gguf.py --base {base} {folder}",
    ]


def write_model(lm: CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder that transformers loads and samples from: weights, tokenizer, generation config."""
    pretrained.save_pretrained(lm, folder)
    _write_text_files(lm, tokenizer, folder)


def _write_text_files(lm: CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    names = ("bos_token_id", "pad_token_id")
    ids = {n: lm.config.source[n] for n in names if lm.config.source.get(n) is not None}
    before = folders.file_of(tokenizer.folder, "generation_config.json")
    others = read_json(before) if before.exists() else {}
    eos = {"eos_token_id": list(tokenizer.eos_ids)} if tokenizer.eos_ids else {}
    atomic.write_json(folder / "generation_config.json", ids | others | eos)
