"""Tiny tokenizers in the shapes that published ones have, and transformers' reading of each."""

import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

WORDS = ["over there", "say hello to the water", "[INST] where [/INST]", "user assistant",
         "a film."]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NORMALIZE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
KINDS = ("prepend", "first", "always", "never", "gemma", "bytes", "bytes-blank")


def save(folder: Path, kind: str, template: str | None = None, more=(), plain=()) -> Path:
    """A folder of a tokenizer.

    Args:
        kind: "prepend" as Llama 2 and Zephyr; "first" as Mistral 0.3, "always" and "never", of
            Metaspace; "gemma"; "bytes" as GPT-2; "bytes-blank" with a blank before a text.
        more, plain: added tokens, special and not.
    """
    names = [("<unk>", True), ("<s>", True), ("</s>", True), *((name, True) for name in more),
             *((name, False) for name in plain)]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind.startswith("bytes"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-blank")
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        first = [name for name, _ in names]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        first, alphabet = [*(name for name, _ in names), *BYTES], []
    made.train_from_iterator(WORDS * 3, trainers.BpeTrainer(
        vocab_size=len(first) + 330, special_tokens=first, initial_alphabet=alphabet,
        show_progress=False,
    ))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    parsed = json.loads(made.to_str())
    parsed["added_tokens"] = [
        {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": special}
        for id, (name, special) in enumerate(names)
    ]
    if not kind.startswith("bytes"):
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        parsed["decoder"] = {"type": "Sequence", "decoders": [
            back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([] if kind == "gemma" else [strip])
        ]}
        parsed["pre_tokenizer"] = {
            "prepend": None,
            "gemma": {"type": "Split", "pattern": {"String": " "},
                      "behavior": "MergedWithPrevious", "invert": False},
        }.get(kind, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind,
                     "split": False})
        prepend = {"type": "Sequence",
                   "normalizers": [{"type": "Prepend", "prepend": "▁"}, NORMALIZE]}
        parsed["normalizer"] = {"prepend": prepend, "gemma": NORMALIZE}.get(kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
