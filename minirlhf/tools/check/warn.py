"""What is odd about the rows of a data file: each kind of oddity with the rows that have it."""

from collections.abc import Callable

from minirlhf.batches.preferences import ordered
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.tools.check.rows import KINDS, SeenFile, SeenRow

LENGTH_BIAS, ENOUGH = 2 / 3, 30  # share of pairs that the longer answer wins, and of how many
Oddities = dict[str, list[str]]  # what is odd -> where


def _where(rows: list[SeenRow], test: Callable[[SeenRow], object]) -> list[str]:
    return [row.where for row in rows if test(row)]


def odd_texts(file: SeenFile) -> Oddities:
    """What is odd about the rows as they stand in the file."""
    rows, before, again = file.rows, set(), []
    for row in rows:
        again += [row.where] if row.key in before else []
        before.add(row.key)
    negative = [row.where for row, (margin, _) in zip(rows, file.labels, strict=False)
                if margin is not None and margin < 0]
    return {
        "the same row as one before": again,
        "a pair that stands there both ways round": _both_ways(rows),
        "a list with the same response twice": _where(
            rows, lambda r: file.kind == KINDS["lists"] and len(set(r.key[1:])) < len(r.ranks)
        ),
        "a negative margin: the rejected answer should win": negative,
        "U+FFFD, which stands for text that could not be read":
            _where(rows, lambda r: any("\ufffd" in text for text in r.strings)),
        "a turn without text": _where(rows, lambda r: not all(map(str.strip, r.strings))),
        "a blank ends the prompt, which tokenizers expect before a word":
            _where(rows, lambda r: isinstance(r.parts[0], str) and r.parts[0].endswith(" ")),
        "no blank between prompt and answer": _where(rows, _touch),
    }


def _both_ways(rows: list[SeenRow]) -> list[str]:
    """Rows that prefer one response to another where some row, maybe the same, has it otherwise."""
    pairs = [
        {(prompt, answers[i], answers[j]) for i, j in ordered(row.ranks)}
        for row in rows for prompt, *answers in [row.key]
    ]
    seen = set().union(*pairs)
    return [row.where for row, here in zip(rows, pairs, strict=True)
            if any(a != b and (prompt, b, a) in seen for prompt, a, b in here)]


def _touch(row: SeenRow) -> bool:
    """Whether strings grow together: "Why?" and "Because". Not all scripts put blanks there."""
    prompt, *answers = row.parts
    if not isinstance(prompt, str) or not prompt:
        return False
    seams = (prompt[-1] + answer[0] for answer in answers if answer)
    return any(seam.isascii() and not any(map(str.isspace, seam)) for seam in seams)


def odd_tokens(rows: list[SeenRow], tokenizer: Tokenizer, ended: bool) -> Oddities:
    """What is odd about rows once they are ids; `ended`: responses should end with eos."""
    bos, eos_ids = tokenizer.bos_id, tokenizer.eos_ids
    unknown = None if tokenizer.unknown_id in eos_ids else tokenizer.unknown_id

    def twice(row: SeenRow) -> bool:
        prompt, *answers = row.parts
        starts = [(prompt + answer)[:2] for answer in answers or [[]]]
        return [bos, bos] in starts or any(prompt and ids[:1] == [bos] for ids in answers)

    def endless(row: SeenRow) -> bool:
        return ended and not all(ids and ids[-1] in eos_ids for ids in row.parts[1:])

    tokens = sum(sum(row.sizes) for row in rows)
    unknowns = sum(ids.count(unknown) for row in rows for ids in row.parts)
    return {
        "the beginning-of-text token twice": _where(rows, twice),
        "no eos at the end: nothing there teaches to stop": _where(rows, endless),
        f"unknown tokens, {unknowns / tokens:.2%} of all tokens":
            _where(rows, lambda r: any(unknown in ids for ids in r.parts)),
    }


def odd_lengths(rows: list[SeenRow]) -> Oddities:
    """Rows in which mostly the longer response is preferred, where length alone tells too much."""
    signs = [[(by > 0) - (by < 0) for by in row.longer_by] for row in rows]
    wins, losses = (sum(here.count(sign) for here in signs) for sign in (1, -1))
    if wins + losses < ENOUGH or wins <= LENGTH_BIAS * (wins + losses):
        return {}
    where = [row.where for row, here in zip(rows, signs, strict=True) if sum(here) > 0]
    return {"the longer answer wins: length alone may be learned": where}


def shared_with(first: SeenFile, file: SeenFile) -> tuple[dict, Oddities]:
    """How much of a file stands in the first one too, and the rows that do."""

    def leaks(row: SeenRow) -> tuple:
        """What held-out rows must not share: the prompt or, without one, the answers."""
        return row.key[1:] if row.parts[0] is None else row.key[:1]

    path, keys = first.report.path, {row.key for row in first.rows}
    texts = {text for row in first.rows for text in leaks(row)}
    same = _where(file.rows, lambda row: row.key in keys)
    partly = _where(file.rows, lambda row: not texts.isdisjoint(leaks(row)))
    odd = {f"also in {path}": same}
    if len(partly) > len(same):
        odd[f"prompt or answer also in {path}"] = partly
    return {"with": path, "rows": len(same), "prompts_or_answers": len(partly)}, odd
