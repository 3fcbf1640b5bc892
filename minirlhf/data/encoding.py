"""The parts of a row -> ids, which are those of the whole text, cut where the prompt ends.

An answer ends with eos, unless it is truncated: then its text does not end there. For a reward
model an answer in messages ends where the rendered text does, as in other tools.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minirlhf.data.arguments import ARGUMENTS, given_arguments, template_arguments
from minirlhf.data.chat_template import TemplateOverrun
from minirlhf.data.dialogues import Dialogue
from minirlhf.data.ending import completed
from minirlhf.data.formats import was_sampled
from minirlhf.data.parts import Parts, is_chat
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.rows import Row
from minirlhf.files.sieve import RowPolicy, Sieve


def encode(
    path: str | Path, rows: list[tuple[Row, Parts]], tokenizer: Tokenizer | None, sieve: Sieve,
    whole: bool = False,
) -> tuple[list[tuple[list[int], ...] | None], list[int], list[str]]:
    """((prompt ids, response ids, ...) of each row, None where the sieve took it;
    ids that the tokenizer puts before a text; notes for the report).

    Args:
        whole: as in `Tokenizer.encode_dialogue`.
    """
    parts = [part for _, part in rows]
    sample = parts[0][-1]
    ready = isinstance(sample, list) and not isinstance(sample[0], dict)
    if tokenizer is None and not ready:
        raise UserError(path, "holds text and there is no tokenizer", "give one, or token ids")
    lead = [] if tokenizer is None else tokenizer.encode("")
    adds_eos = not (whole and isinstance(sample, list))  # a template has written what it writes
    if not ready and adds_eos and len(parts[0]) > 1 and not tokenizer.eos_ids:
        what = "names no eos token, which every text ends with"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    counts: Counter[str] = Counter()
    if ready:
        found = parts
    elif isinstance(sample, str):
        found = _each_string(parts, tokenizer, counts)
    else:
        found = tokenizer.encode_dialogues([
            Dialogue(prompt, answers, was_sampled(row), _is_cut(row),
                     template_arguments(row.columns, row.where))
            for row, (prompt, *answers) in rows
        ], whole, counts)
    headless = parts[0][0] is None or (sieve.policy.allow_empty_prompt and len(parts[0]) > 1)
    encoded: list[tuple[list[int], ...] | None] = []
    for (row, _), ids in zip(rows, found, strict=True):
        try:
            if isinstance(ids, UserError):
                raise type(ids)(row.where, str(ids))
            if ready:
                ids = _checked(row, ids, tokenizer)
                if whole and tokenizer is not None and was_sampled(row):
                    head, *answers = ids
                    ids = head, *(completed(tokenizer, head, answer) for answer in answers)
            else:
                ids = _ended(row, ids, headless, tokenizer.eos_ids if adds_eos else ())
        except TemplateOverrun:  # whatever becomes of bad rows: the next one would take as long
            raise
        except UserError as error:
            sieve.reject(error, row.raw)
            ids = None
        encoded.append(ids)
    return encoded, lead, [f"{what}, in {count:,} rows" for what, count in counts.items() if count]


def _each_string(
    parts: list[Parts], tokenizer: Tokenizer, counts: Counter[str]
) -> list[tuple[list[int], ...] | UserError]:
    """Ids of all rows, or what is wrong with a row."""
    texts = [(prompt or "", *answers) for prompt, *answers in parts]
    with suppress(UserError):  # of one row, which is found below
        return tokenizer.encode_parts(texts, counts)
    counts.clear()
    found: list[tuple[list[int], ...] | UserError] = []
    for row in texts:
        try:
            found += tokenizer.encode_parts([row], counts)
        except UserError as error:
            found.append(error)
    return found


def _ended(
    row: Row, ids: tuple[list[int], ...], headless: bool, eos_ids: Sequence[int]
) -> tuple[list[int], ...]:
    """Ids of a row, its answers with eos at the end; a template's own end of turn is one.

    Args:
        headless: whether there may be nothing before the answers.
        eos_ids: the first is added to an answer that ends with none of them; (): nothing is.
    """
    prompt, *answers = ids
    if not (was_sampled(row) or all(answers)) or not (prompt or headless):
        why = "" if answers else "the tokenizer puts no beginning-of-text there: "
        raise UserError(row.where, "a text without any token", f"{why}remove the row")
    if _is_cut(row) or not eos_ids:
        return ids
    return (prompt, *(ids if ids and ids[-1] in eos_ids else [*ids, eos_ids[0]] for ids in answers))


def _is_cut(row: Row) -> bool:
    """Whether the length limit ended a response, so that its text breaks off."""
    return was_sampled(row) and row.columns["finish_reason"] == "length"


def read_part(ids: list[int], unread: int | None) -> list[int]:
    """The ids up to where a reward model reads their score: those of `unread` at the end are not.

    >>> read_part([5, 0], 0), read_part([5, 0, 7], 0), read_part([5, 0, 0], 0), read_part([5], None)
    ([5], [5, 0, 7], [5], [5])
    """
    while ids and ids[-1] == unread:
        ids = ids[:-1]
    return ids


def _checked(
    row: Row, part: tuple[list[int] | None, ...], tokenizer: Tokenizer | None
) -> tuple[list[int], ...]:
    """Ids that came as ids, if they are this tokenizer's: by the row's word, and by their size."""
    if tokenizer is not None:
        made_by = row.columns.get("tokenizer") if was_sampled(row) else None
        if made_by not in (None, tokenizer.fingerprint):
            do = "leave out its input_ids and prompt_length, and its texts are read"
            raise UserError(row.where, "holds ids of another tokenizer", do)
        for ids in part:
            if ids and max(ids) >= tokenizer.vocab_size:
                legal = f"the tokenizer has the ids 0 to {tokenizer.vocab_size - 1}"
                raise UserError(row.where, f"token id {max(ids)}", legal)
    return tuple(ids or [] for ids in part)


def unread_arguments(
    rows: list[tuple[Row, Parts]], tokenizer: Tokenizer | None, policy: RowPolicy
) -> list[str]:
    """A note where rows tell a chat template what none reads."""
    names, why = set(given_arguments(policy.template_kwargs)), "no chat template renders these rows"
    chat = is_chat(rows[0][1][-1])
    for row, _ in rows:
        told = template_arguments(row.columns, row.where) if chat else {
            name: row.columns.get(name) for name in ARGUMENTS
        }
        names |= {name for name, value in told.items() if value or name not in ARGUMENTS}
    if chat and names:
        names, why = names - tokenizer.template_reads(), "the chat template does not look at it"
    return [f"{', '.join(sorted(names))} not read: {why}"] if names else []


def fit(
    prompt: list[int], responses: list[list[int]], max_length: int, overlong: str, lead: list[int]
) -> tuple[list[int], list[list[int]], str | None]:
    """(prompt, responses, None) truncated to max_length, or with the reason to drop the row."""
    if overlong == "drop":
        return prompt, responses, "longer than max_length"
    if overlong == "truncate_response":
        room = max_length - len(prompt)
        why = "prompt alone fills max_length" if room < 1 else None
        return prompt, [ids[:room] for ids in responses], why
    kept = len(lead) if prompt[: len(lead)] == lead else 0  # beginning-of-text stays in front
    room = max_length - kept - max(map(len, responses), default=0)
    if room < 1 or len(prompt) <= kept:
        return prompt, responses, "no room for the prompt within max_length"
    return prompt[:kept] + prompt[kept:][-room:], responses, None
