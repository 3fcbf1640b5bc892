"""The parts of a row -> ids, which are those of the whole text, cut where the prompt ends.

An answer ends with eos, unless it is truncated: then its text does not end there. For a reward
model an answer in messages ends where the rendered text does, as in other tools.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minirlhf import console
from minirlhf.data.arguments import ARGUMENTS, given_arguments, template_arguments
from minirlhf.data.chat_template import TemplateOverrun
from minirlhf.data.control import strings_of
from minirlhf.data.dialogues import Dialogue
from minirlhf.data.ending import completed
from minirlhf.data.formats import was_sampled
from minirlhf.data.parts import Parts, is_chat
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.data.turns import Gaps, fold, unfold
from minirlhf.errors import UserError, printable
from minirlhf.files.rows import Row
from minirlhf.files.sieve import RowPolicy, Sieve

# What is counted, of rows.
ENDED = "an answer ends with the name of an eos, which ends it once"
SPELLED = "names of control tokens stay text"
BATCH = 1024  # rows of strings that are encoded at once
DELAY = 3.0  # seconds before a bar is shown


class Encoding(NamedTuple):
    """The rows of a file in tokens."""

    ids: list[tuple[list[int], ...] | None]  # (prompt, response, ...); None: the sieve took the row
    gaps: list[Gaps]  # of each row, what of its one response is not learned
    lead: list[int]  # what the tokenizer puts before a text
    notes: list[str]  # for the report


def encode(
    path: str | Path, rows: list[tuple[Row, Parts]], tokenizer: Tokenizer | None, sieve: Sieve,
    whole: bool = False, each_turn: bool = False,
) -> Encoding:
    """The parts of a file's rows as ids.

    Args:
        whole: as in `Tokenizer.encode_dialogue`.
        each_turn: of several messages in an answer, the assistant's alone are learned.
    """
    parts = [part for _, part in rows]
    sample = parts[0][-1]
    ready = isinstance(sample, list) and not isinstance(sample[0], dict)
    if tokenizer is None and not ready:
        raise UserError(path, "holds text and there is no tokenizer", "give one, or token ids")
    lead = [] if tokenizer is None else tokenizer.encode("")
    adds_eos = not (whole and isinstance(sample, list))  # a template has written what it writes
    rendered = whole and isinstance(sample, str) and sieve.policy.rendered
    if not ready and adds_eos and len(parts[0]) > 1 and not tokenizer.eos_ids:
        what = "names no eos token, which every text ends with"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    counts: Counter[str] = Counter()
    gaps: list[Gaps] = [()] * len(rows)
    if ready:
        found = parts
    elif isinstance(sample, str):
        found = _each_string(path, rows, tokenizer, sieve.policy, rendered, counts)
    else:
        found, gaps = _each_dialogue(path, rows, tokenizer, sieve.policy, whole, each_turn, counts)
    headless = parts[0][0] is None or (sieve.policy.allow_empty_prompt and len(parts[0]) > 1)
    encoded: list[tuple[list[int], ...] | None] = []
    for (row, _), ids in zip(rows, found, strict=True):
        try:
            if isinstance(ids, UserError):
                raise ids if ids.where == row.where else type(ids)(row.where, str(ids))
            if ready:
                ids = _checked(row, ids, tokenizer)
                if whole and tokenizer is not None and was_sampled(row):
                    head, *answers = ids
                    ids = head, *(completed(tokenizer, head, answer) for answer in answers)
            else:
                ids = _ended(
                    row, ids, headless, tokenizer.eos_ids if adds_eos and not rendered else ()
                )
                if rendered and not _is_cut(row):
                    head, *answers = ids
                    ids = head, *(_whole_end(tokenizer, head, answer) for answer in answers)
        except TemplateOverrun:  # whatever becomes of bad rows: the next one would take as long
            raise
        except UserError as error:
            sieve.reject(error, row.raw)
            ids = None
        encoded.append(ids)
    notes = [f"{what}, in {count:,} rows" for what, count in counts.items() if count]
    return Encoding(encoded, gaps, lead, notes)


def _bar(path: str | Path, rows: int) -> tqdm:
    """Shown where someone looks on, once it has taken a while."""
    bars = console.bar_kind()
    return bars(desc=f"tokenise {printable(Path(path).name, 40)}", total=rows, unit=" rows",
                delay=DELAY, leave=False, disable=not console.has_bars())


def _each_string(
    path: str | Path, rows: list[tuple[Row, Parts]], tokenizer: Tokenizer, policy: RowPolicy,
    whole: bool, counts: Counter[str],
) -> list[tuple[list[int], ...] | UserError]:
    """Ids of all rows, or what is wrong with a row; `whole`: with what stands behind their eos."""
    found: list = [_plain_parts(row, parts, tokenizer, policy, counts) for row, parts in rows]
    texts = [part for part in found if not isinstance(part, UserError)]
    encoded: list = []
    with _bar(path, len(texts)) as bar:
        for start in range(0, len(texts), BATCH):
            part = [row for row, _ in texts[start : start + BATCH]]
            encoded += _batch(part, tokenizer, policy.rendered, counts)
            bar.update(len(part))
    ids = iter(encoded)
    if whole:
        return [part if isinstance(part, UserError) else next(ids) for part in found]
    return [
        part if isinstance(part, UserError) else _with_ends(next(ids), part[1], tokenizer)
        for part in found
    ]


def _batch(
    texts: list[list[str]], tokenizer: Tokenizer, rendered: bool, counts: Counter[str]
) -> list[tuple[list[int], ...] | UserError]:
    """Ids of several rows at once, or what is wrong with a row."""
    here: Counter[str] = Counter()
    try:
        encoded: list = tokenizer.encode_parts(texts, here, rendered)
    except UserError as error:
        if len(texts) == 1:
            return [error]
        return [ids for text in texts for ids in _batch([text], tokenizer, rendered, counts)]
    counts += here
    return encoded


def _whole_end(tokenizer: Tokenizer, head: list[int], answer: list[int]) -> list[int]:
    """A rendered answer with all that the template writes behind it; with a missing eos first."""
    if tokenizer.to_its_end(answer) != answer:
        return answer  # it has that already
    ended = answer and answer[-1] in tokenizer.eos_ids
    return completed(tokenizer, head, answer if ended else [*answer, tokenizer.eos_ids[0]])


def _plain_parts(
    row: Row, parts: Parts, tokenizer: Tokenizer, policy: RowPolicy, counts: Counter[str]
) -> tuple[list[str], list[int | None]] | UserError:
    """(prompt and answers without the eos that an answer may end with; these eos)."""
    prompt, *answers = parts
    if policy.rendered:
        return [prompt or "", *answers], [None] * len(answers)
    if was_sampled(row):  # a text without any token but what decoding shows
        held = [tokenizer.control_name(prompt)]
        cut = [(text, None) for text in answers]
        counts[SPELLED] += any(tokenizer.control_name(text, answer=True) for text in answers)
    else:
        cut = [tokenizer.without_end(text) for text in answers]
        held = [tokenizer.control_name(prompt or "")]
        held += [tokenizer.control_name(text, answer=True) for text, _ in cut]
    texts, ends = [text for text, _ in cut], [end for _, end in cut]
    if (name := next(filter(None, held), None)) is not None:
        if not policy.spelled:
            return _holds(row, name)
        counts[SPELLED] += 1
    counts[ENDED] += any(end is not None for end in ends)
    return [prompt or "", *texts], ends


def _holds(row: Row, name: str) -> UserError:
    what = f"holds {printable(name, 40)!r}, the name of a control token"
    return UserError(row.where, what, "--spelled reads such names as text, --rendered as tokens")


def _with_ends(
    ids: tuple[list[int], ...] | UserError, ends: list[int | None], tokenizer: Tokenizer
) -> tuple[list[int], ...] | UserError:
    """With the eos that a text named at its end; without the blanks behind one."""
    if isinstance(ids, UserError):
        return ids
    prompt, *answers = ids
    return prompt, *(
        tokenizer.to_its_end(answer if end is None else [*answer, end])
        for answer, end in zip(answers, ends, strict=True)
    )


def _each_dialogue(
    path: str | Path, rows: list[tuple[Row, Parts]], tokenizer: Tokenizer, policy: RowPolicy,
    whole: bool, each_turn: bool, counts: Counter[str],
) -> tuple[list[tuple[list[int], ...] | UserError], list[Gaps]]:
    """(ids of all rows, or what is wrong with a row; what of each is not learned)."""
    if policy.rendered:
        do = "leave it out: the chat template renders them"
        raise UserError(path, "holds messages, and --rendered is for strings", do)
    found: list = [_plain_turns(row, parts, tokenizer, policy, counts) for row, parts in rows]
    asked = [[] if isinstance(part, UserError) else unfold(part) if each_turn else [part]
             for part in found]
    flat = [dialogue for dialogues in asked for dialogue in dialogues]
    every: list[Counter[str]] = [Counter() for _ in flat]
    ids = tokenizer.encode_dialogues(flat, whole, every)
    told, gaps = iter(every), [()] * len(rows)
    with _bar(path, len(rows)) as bar:
        for at, ((row, _), dialogues) in enumerate(zip(rows, asked, strict=True)):
            if dialogues:
                parts = list(islice(ids, len(dialogues)))
                found[at], gaps[at] = fold(row, parts) if len(parts) > 1 else (parts[0], ())
                counts.update({what for one in islice(told, len(parts)) for what in +one})
            bar.update()
    return found, gaps


def _plain_turns(
    row: Row, parts: Parts, tokenizer: Tokenizer, policy: RowPolicy, counts: Counter[str]
) -> Dialogue | UserError:
    """The row's dialogue, each turn of the assistant without the eos that it may end with."""
    sampled, ended, spelled, turns = was_sampled(row), False, False, []
    for at, messages in enumerate(parts):
        turns.append([])
        for message in messages:
            text = message.get("content")
            if message.get("role") != "assistant" or not isinstance(text, str):
                spelled |= any(map(tokenizer.control_name, strings_of(message)))
            elif sampled and at:  # a text without any token but what decoding shows
                spelled |= tokenizer.control_name(text, answer=True) is not None
            else:
                text, end = tokenizer.without_end(text)
                ended |= end is not None
                if name := tokenizer.control_name(text, answer=True):
                    if not policy.spelled:
                        return _holds(row, name)
                    spelled = True
                message = message | {"content": text}
            turns[-1].append(message)
    counts[ENDED] += ended
    counts[SPELLED] += spelled
    arguments = template_arguments(row.columns, row.where)
    return Dialogue(turns[0], turns[1:], sampled, _is_cut(row), arguments)


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
