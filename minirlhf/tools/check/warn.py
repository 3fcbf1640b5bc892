"""What is odd about the rows of a data file: each kind of oddity once, with its count."""

from collections.abc import Sequence

import numpy as np

from minirlhf.batches.preferences import ordered
from minirlhf.data.formats import Part
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.tools.check.rows import Model, Raw, Sizes, ids_of, strings_of

LENGTH_BIAS, ENOUGH = 2 / 3, 30  # share of pairs that the longer answer wins, and of how many


def _warning(what: str, where: Sequence[str]) -> list[dict]:
    """[] where there is nothing to warn of."""
    return [{"what": what, "rows": len(where), "first": where[0]}] if where else []


def _touch(prompt: Part | None, *answers: Part) -> bool:
    """Whether strings grow together: "Why?" and "Because". Not all scripts put blanks there."""
    if not isinstance(prompt, str) or not prompt:
        return False
    seams = (prompt[-1] + answer[0] for answer in answers if answer)
    return any(seam.isascii() and not any(map(str.isspace, seam)) for seam in seams)


def _swapped(raw: Raw) -> list[str]:
    """Rows that prefer one response to another where some row, maybe the same, has it otherwise."""
    pairs = [
        {(key[0], key[1 + i], key[1 + j]) for i, j in ordered(ranks)}
        for key, ranks in zip(raw.keys, raw.ranks, strict=True)
    ]
    seen = set().union(*pairs)
    return [
        where for where, here in zip(raw.where, pairs, strict=True)
        if any(a != b and (p, b, a) in seen for p, a, b in here)
    ]


def raw_warnings(raw: Raw, model: Model | None) -> list[dict]:
    """What is odd about the rows themselves."""
    rows = list(zip(raw.where, raw.parts, raw.keys, strict=True))
    seen, twice = set(), []
    for where, _, key in rows:
        twice += [where] if key in seen else []
        seen.add(key)
    found = _warning("the same row as one before", twice)
    if raw.recipe == "reward":
        found += _warning("a pair that stands there both ways round", _swapped(raw))
    if raw.lists:
        again = [where for where, _, (_, *answers) in rows if len(set(answers)) < len(answers)]
        found += _warning("a list with the same response twice", again)
    elif raw.recipe == "reward":
        below = [w for w, m in zip(raw.where, raw.margins, strict=True) if m is not None and m < 0]
        found += _warning("a negative margin: the rejected answer should win", below)
    odd = {
        "U+FFFD, which stands for text that could not be read": lambda text: "\ufffd" in text,
        "a turn without text": lambda text: not text.strip(),
    }
    if model is not None:
        odd["a control token's name, read as ordinary text"] = model.tokenizer.special_text.search
    for what, test in odd.items():
        hits = [w for w, parts, _ in rows if any(test(s) for p in parts for s in strings_of(p))]
        found += _warning(what, hits)
    ends = [w for w, (p, *_), _ in rows if isinstance(p, str) and p.endswith(" ")]
    found += _warning("a blank ends the prompt, which tokenizers expect before a word", ends)
    touching = [where for where, parts, _ in rows if _touch(*parts)]
    return found + _warning("no blank between prompt and answer", touching)


def _leaks(key: tuple) -> tuple:
    """What held-out rows must not share: the prompt or, without one, the answers."""
    return key[1:] if key[0] is None else key[:1]


def overlap(raw: Raw, first: Raw) -> tuple[dict, list[dict]]:
    """How much of a file stands in the first one too, and the warnings about it."""
    rows, both = set(first.keys), list(zip(raw.where, raw.keys, strict=True))
    texts = {text for key in first.keys for text in _leaks(key)}
    same = [where for where, key in both if key in rows]
    shared = [where for where, key in both if not texts.isdisjoint(_leaks(key))]
    warnings = _warning(f"also in {first.path}", same)
    if len(shared) > len(same):
        warnings += _warning(f"prompt or answer also in {first.path}", shared)
    return {"with": first.path, "rows": len(same), "prompts_or_answers": len(shared)}, warnings


def token_warnings(examples: list, tokenizer: Tokenizer, ended: bool) -> list[dict]:
    """What is odd about rows once they are ids; `ended`: answers should end with eos."""
    bos, eos_ids = tokenizer.bos_id, tokenizer.eos_ids
    unknown = None if tokenizer.unknown_id in eos_ids else tokenizer.unknown_id
    twice, endless, lost, tokens, lost_tokens = [], [], [], 0, 0
    for example in examples:
        prompt, *answers = ids_of(example)
        starts = [(prompt + answer)[:2] for answer in answers or [[]]]
        if [bos, bos] in starts or (prompt and any(answer[:1] == [bos] for answer in answers)):
            twice.append(example.where)
        if ended and not all(answer and answer[-1] in eos_ids for answer in answers):
            endless.append(example.where)
        unknowns = sum(ids.count(unknown) for ids in (prompt, *answers))
        lost += [example.where] if unknowns else []
        lost_tokens += unknowns
        tokens += len(prompt) + sum(map(len, answers))
    found = _warning("the beginning-of-text token twice", twice)
    found += _warning("no eos at the end: nothing there teaches to stop", endless)
    return found + _warning(f"unknown tokens, {lost_tokens / tokens:.2%} of all tokens", lost)


def length_bias(rows: list[Sizes]) -> list[dict]:
    """Whether length alone tells which answer is preferred: the rows in which it mostly does."""
    signs = [np.sign(row.longer_by) for row in rows]
    wins = sum(int((sign > 0).sum()) for sign in signs)
    decided = sum(np.count_nonzero(sign) for sign in signs)
    if decided < ENOUGH or wins <= LENGTH_BIAS * decided:
        return []
    what = "the longer answer wins: a reward model may learn length alone"
    return [{"what": what, "rows": sum(int(sign.sum()) > 0 for sign in signs), "first": None}]


def plain_template(raw: Raw, model: Model | None) -> list[dict]:
    """Whether dialogues are written without a template of the model's own."""
    turns = raw.parts[0][-1]
    if model is None or not (isinstance(turns, list) and isinstance(turns[0], dict)):
        return []
    if model.tokenizer.template_origin != "plain fallback":
        return []
    return _warning("written by a plain template, the model has none", raw.where)
