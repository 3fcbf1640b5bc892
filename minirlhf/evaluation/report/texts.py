"""What a run wrote: responses before and after, pairs with their scores, and the heat of tokens."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.pieces import pieces
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError
from minirlhf.evaluation.report.curves import told
from minirlhf.evaluation.report.markup import conversation, folded, shown
from minirlhf.evaluation.report.record import RunRecord, number
from minirlhf.evaluation.report.style import SHADES
from minirlhf.run.language import tell

SHOWN = 6  # prompts with their responses, and pairs
TEXT = 1500  # characters of each
PIECES = 300  # of a response whose tokens are shown


class Quantity(NamedTuple):
    """What the tokens of a response can be coloured by."""

    name: str
    meaning: str
    values: list[float]


# ---- responses and pairs -------------------------------------------------------------------------


def number_of(row: dict) -> tuple[str, float | None]:
    """What a row is judged by: its name and value."""
    for name in ("score", "reward", "kl"):
        if (value := number(row.get(name))) is not None:
            return name, None if math.isnan(value) else value
    return "", None


def response(row: dict, head: str, language: str) -> str:
    """A response behind its step and score."""
    name, value = number_of(row)
    mark = f' <span class="score">{name} {told(value)}</span>' if name else ""
    text = shown("" if row.get("response") is None else row["response"], TEXT, language)
    text = text or f'<span class="faint">{tell("(empty)", language)}</span>'
    end = f" · {shown(row['finish_reason'], 20)}" if row.get("finish_reason") else ""
    return (f'<div><div class="faint">{head}{mark}{end}</div><div class="text" tabindex="0" '
            f'dir="auto">{text}</div></div>')


def prompt_of(row: dict, language: str) -> str:
    inside = conversation(row.get("prompt"), TEXT, language)
    return f'<div class="text prompt" tabindex="0" dir="auto">{inside}</div>'


def before_and_after(record: RunRecord, language: str) -> str:
    """The first and the last table of samples, prompt by prompt; "" where there is none."""
    rows = [row for row in record.samples if row.get("kind") == "sample"]
    steps = sorted({step for row in rows if (step := number(row.get("step"))) is not None})
    if not steps:
        return ""
    cards = []
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("step") in (steps[0], steps[-1]):
            by_prompt.setdefault(repr(row.get("prompt")), []).append(row)
    for same in list(by_prompt.values())[:SHOWN]:
        ends = [same[0], same[-1]] if len(same) > 1 else same
        texts = "".join(response(row, at_step(row, language), language) for row in ends)
        prompt = prompt_of(same[0], language)
        cards.append(f'<div class="card">{prompt}'
                     f'<div class="pair">{texts}</div></div>')
    return "".join(cards) + left_out(len(by_prompt) - SHOWN, language)


def at_step(row: dict, language: str) -> str:
    return shown(tell("step {step}", language, step=told(number(row.get("step")))), 40)


def left_out(count: int, language: str) -> str:
    if count <= 0:
        return ""
    return f'<p class="faint">{tell("{count:,} more are not shown.", language, count=count)}</p>'


def rollouts(record: RunRecord, step: float) -> list[dict]:
    """The responses of a step, the lowest score first."""
    rows = [r for r in record.samples if r.get("kind") == "rollout" and r.get("step") == step]
    scored = [row for row in rows if number_of(row)[1] is not None]
    return sorted(scored, key=lambda row: number_of(row)[1])


def steps_of_rollouts(record: RunRecord) -> list[float]:
    rows = (row for row in record.samples if row.get("kind") == "rollout")
    return sorted({step for row in rows if (step := number(row.get("step"))) is not None})


def extremes(rows: list[dict]) -> Iterator[tuple[str, dict]]:
    """The highest, the median and the lowest of rows that are sorted, each by its name."""
    found = {"highest": rows[-1:], "median": rows[(len(rows) - 1) // 2 :][:1], "lowest": rows[:1]}
    taken: list[dict] = []
    for name, some in found.items():
        if some and not any(some[0] is other for other in taken):
            taken.append(some[0])
            yield name, some[0]


def of_rollouts(record: RunRecord, language: str) -> str:
    """Responses of the first and of the last step that were kept, by their scores."""
    steps = steps_of_rollouts(record)
    columns = []
    for step in dict.fromkeys((*steps[:1], *steps[-1:])):
        rows = rollouts(record, step)
        head = tell("step {step}: {count:,} responses were kept", language, step=told(step),
                    count=len(rows))
        texts = "".join(
            prompt_of(row, language) + response(row, tell(name, language), language)
            for name, row in extremes(rows)
        )
        columns.append(f'<div class="card"><h3>{head}</h3>{texts}</div>')
    return f'<div class="pair">{"".join(columns)}</div>' if columns else ""


def of_pairs(record: RunRecord, language: str) -> str:
    """Held-out pairs of the last evaluation with both scores; of KTO its judged responses."""
    rows = [row for row in record.samples if "kind" not in row and number(row.get("step"))]
    rows = [row for row in rows if row["step"] == rows[-1]["step"]]  # none of none
    cards = []
    for row in rows[:SHOWN]:
        sides = [side for side in ("chosen", "rejected") if side in row]
        texts = "".join(
            response({"response": row[side], "score": row.get(f"{side}_score")},
                     tell(side, language), language) for side in sides
        ) or response(row, at_step(row, language), language)
        prompt = prompt_of(row, language) if row.get("prompt") else ""
        cards.append(f'<div class="card">{prompt}'
                     f'<div class="pair">{texts}</div></div>')
    return "".join(cards) + left_out(len(rows) - SHOWN, language)


# ---- tokens --------------------------------------------------------------------------------------

MEANINGS = {
    "advantage": "how much better the token turned out than the critic or the group expected, "
    "before whitening; what is above 0 is made likelier",
    "KL": "log-prob under the policy minus that under the reference (k1), nats",
    "reward": "what the token itself is rewarded: the KL penalty, and the score on the last one",
    "value": "what the critic expects from here on",
}


def quantities(row: dict) -> list[Quantity]:
    """What a rollout's row holds for each token of its response."""
    ids = row.get("response_ids")
    if not isinstance(ids, list) or not ids:
        return []

    def column(name: str) -> list[float] | None:
        values = row.get(name)
        if not isinstance(values, list) or len(values) != len(ids):
            return None
        numbers = [number(value) for value in values]
        return None if any(v is None or math.isnan(v) for v in numbers) else numbers

    policy, ref = column("old_logprobs"), column("ref_logprobs")
    found = {
        "advantage": column("advantages"),
        "KL": [p - r for p, r in zip(policy, ref, strict=True)] if policy and ref else None,
        "reward": column("rewards"), "value": column("old_values"),
    }
    return [Quantity(name, MEANINGS[name], values) for name, values in found.items() if values]


def tokenizer_of(record: RunRecord) -> Tokenizer | None:
    """The tokenizer that the run wrote, or read."""
    places = [record.folder / "model", record.folder / "adapter"]
    if isinstance(model := record.settings.get("model"), str):
        places.append(Path(model))
    for place in places:
        if place.is_dir():
            try:
                return load_tokenizer(place)
            except UserError:
                continue  # the page says that there is none
    return None


def heat_maps(record: RunRecord, language: str) -> str:
    """The tokens of some responses of the last step that was kept; "" where no row has ids."""
    steps = steps_of_rollouts(record)
    rows = rollouts(record, steps[-1]) if steps else []
    rows = [row for row in rows if quantities(row)]
    if not rows:
        return ""
    tokenizer = tokenizer_of(record)
    if tokenizer is None:
        text = "The tokenizer of this run was not found, so its tokens have no text."
        return f"<p>{tell(text, language)}</p>"
    return "".join(
        f'<div class="card"><div class="faint">{at_step(row, language)}, {tell(name, language)}'
        f' <span class="score">{number_of(row)[0]} {told(number_of(row)[1])}</span></div>'
        f"{prompt_of(row, language)}{''.join(_heats(row, tokenizer, language))}</div>"
        for name, row in extremes(rows)
    )


def _heats(row: dict, tokenizer: Tokenizer, language: str) -> Iterator[str]:
    """The response once in the heat of each quantity, the first one open."""
    ids, before = row["response_ids"], row.get("prompt_ids")
    if not (are_ids(ids) and are_ids(before)):
        return
    parts = pieces(tokenizer, before, ids[: 2 * PIECES])
    for k, quantity in enumerate(quantities(row)):
        top = max(map(abs, quantity.values)) or 1.0
        spans = "".join(_span(quantity, part.text, part.start, part.end, top)
                        for part in parts[:PIECES])
        rest = len(ids) - (parts[:PIECES][-1].end if parts else 0)
        more = tell("… ({count:,} tokens cut)", language, count=rest) if rest else ""
        name, meaning = tell(quantity.name, language), tell(quantity.meaning, language)
        legend = (f'<p class="scale"><b>{name}</b>: {meaning}. <span class="n{SHADES}">'
                  f'{told(-top)}</span> <span>0</span> <span class="p{SHADES}">{told(top)}</span>'
                  "</p>")
        inside = f'{spans}<span class="cut">{more}</span>'
        inside = f'{legend}<div class="heat" tabindex="0">{inside}</div>'
        yield inside if k == 0 else folded(name, inside)


def _span(quantity: Quantity, text: str, start: int, end: int, top: float) -> str:
    """One piece of text, as dark as the largest of its tokens' values is, which its title tells."""
    values = quantity.values[start:end]
    value = max(values, key=abs)
    shade = round(SHADES * abs(value) / top)
    color = f' class="{"p" if value > 0 else "n"}{shade}"' if shade else ""
    return f'<span{color} title="{", ".join(f"{v:.4g}" for v in values)}">{shown(text, 200)}</span>'


def are_ids(ids: object) -> bool:
    """Whether a row's field is a list of token ids."""
    return isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
