"""A look at data before anything is spent on it: `minirlhf check FILE [FILE …] --model FOLDER`.

What a recipe refuses before it loads weights is refused here: settings, files, the model's headers
and shapes, its tokenizer, every row. The rest is for the eye: how rows are read, how long they are,
what stands there twice. Lines that begin with "warning:" are worth a thought.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf import config as settings
from minirlhf import pretrained
from minirlhf.config import setting
from minirlhf.data import OVERLONG, Pair, Prompt, Report, Text, load_pairs, load_prompts, load_texts
from minirlhf.errors import OK, UserError, printable, run
from minirlhf.formats import Part, margin, pair_format, prompt_format, text_format
from minirlhf.preferences import without_eos
from minirlhf.recipes.ppo import PPOConfig, prompt_room
from minirlhf.recipes.reward import RewardConfig
from minirlhf.recipes.sft import SFTConfig
from minirlhf.rows import kind_of, read_json, read_rows
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.tools.sample import check_new
from minirlhf.transformer import ModelConfig


class Recipe(NamedTuple):
    """What a recipe reads, and by which settings."""

    config: type
    form: Callable  # of a file's first row
    load: Callable
    sides: tuple[str, ...]  # names of a row's parts


RECIPES = {
    "reward": Recipe(RewardConfig, pair_format, load_pairs, ("prompt", "chosen", "rejected")),
    "sft": Recipe(SFTConfig, text_format, load_texts, ("prompt", "response")),
    "ppo": Recipe(PPOConfig, prompt_format, load_prompts, ("prompt",)),
}
BINS, BAR = 8, 12  # lines of a histogram, characters of its longest bar
WIDTH = 80  # characters in a line of a row's text, of which two are shown
BOUNDARY = ">>>"  # stands where the prompt ends and the response begins
LENGTH_BIAS, ENOUGH = 2 / 3, 30  # share of pairs that the longer answer wins, and of how many


@dataclass(frozen=True)
class CheckConfig:
    data: tuple[str, ...] = setting(
        help="files to look at, the later ones also for what they share with the first; the files "
        "may come first, without this flag", metavar="FILE",
    )  # fmt: skip
    model: str | None = setting(
        None, "model or reward model; none: only what needs no tokenizer", metavar="FOLDER"
    )
    recipe: str = setting(
        "auto", "what the files are for; auto: told by their columns", choices=("auto", *RECIPES)
    )
    max_length: int | None = setting(
        None, "tokens of the longest row; none: the recipe's default", at_least=2
    )
    overlong: str | None = setting(
        None, "what happens to longer rows; none: the recipe's default", choices=OVERLONG
    )
    max_new_tokens: int = setting(64, "room that ppo needs behind a prompt", at_least=1)
    json: str | None = setting(None, "new file for the same facts as JSON", metavar="FILE")

    def check(self) -> list[str]:
        problems = [] if self.data else ["--data: give at least one file"]
        if self.json and not Path(self.json).parent.is_dir():
            problems.append(f"--json: {Path(self.json).parent} is no folder")
        return problems + check_new(self.json)


class Model(NamedTuple):
    """What can be known of a folder without its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    is_reward: bool
    parameters: int
    before_eos: bool  # a reward would be read before eos, so pairs lose theirs
    control_text: re.Pattern  # any control token's name
    unknown_id: int | None


class Raw(NamedTuple):
    """A file as it stands."""

    path: str
    recipe: str
    detected: str
    where: list[str]
    parts: list[tuple[Part | None, ...]]  # (prompt or None, response, ...)
    keys: list[tuple]  # equal where parts are, and fit for a set
    margins: list[float | None]  # empty unless they are pairs

    @property
    def is_ids(self) -> bool:
        sample = self.parts[0][-1]
        return isinstance(sample, list) and isinstance(sample[0], int)


class Measured(NamedTuple):
    """What the loader makes of a file."""

    report: Report
    unit: str  # "tokens" or, without a tokenizer, "characters"
    lengths: dict[str, np.ndarray]  # side -> (N,), before any row is cut or dropped for its length
    limits: dict | None
    samples: list[dict]
    warnings: list[dict]
    problem: UserError | None  # what the recipe would refuse the file for


# -------------------------------------------------------------------------------------- the inputs


def recipe_of(path: str) -> str:
    """The recipe that reads rows like the first one of a file."""
    row = next(iter(read_rows(path)))
    columns = row.columns
    if {"chosen", "rejected"} & columns.keys():
        return "reward"
    for name, recipe in RECIPES.items():
        try:
            used = recipe.form(row).used
        except UserError:
            continue
        turns = columns["messages"] if used == ("messages",) else None
        if name == "sft" and turns and (len(turns) < 2 or turns[-1].get("role") != "assistant"):
            continue  # nobody has answered: a prompt
        return name
    keys = ", ".join(f"{printable(k, 40)} ({kind_of(v)})" for k, v in columns.items())
    legal = "legal: chosen with rejected | prompt with completion or response | prompt | messages"
    raise UserError(row.where, f"columns of no known format: {keys}", f"{legal} | text | ids")


def _key(part: Part | None) -> object:
    if isinstance(part, list):
        return tuple(part) if isinstance(part[0], int) else json.dumps(part, sort_keys=True)
    return part


def read_raw(path: str, recipe: str) -> Raw:
    """All rows of a file, each of the kind that the first one is."""
    rows = list(read_rows(path))
    form = RECIPES[recipe].form(rows[0])
    parts = [form.split(row) for row in rows]
    margins = [margin(row) for row in rows] if recipe == "reward" else []
    keys = [tuple(map(_key, part)) for part in parts]
    return Raw(path, recipe, form.detected, [row.where for row in rows], parts, keys, margins)


def check_weights(folder: Path) -> tuple[bool, int]:
    """(whether a folder holds a reward model, its parameters), from the headers of its files.

    Raises:
        UserError: a file that is not whole; a tensor that is missing, unknown or mis-shaped.
    """
    is_reward = pretrained.has_tensor(pretrained.tensor_files(folder), "score.weight")
    module = pretrained.describe(folder, is_reward)
    return is_reward, sum(parameter.numel() for parameter in module.parameters())


def check_model(name: str, recipes: Iterable[str]) -> Model:
    """A folder's headers, shapes and tokenizer, or why these recipes would refuse it."""
    folder = pretrained.resolve(name)
    config = pretrained.read_config(folder)
    is_reward, parameters = check_weights(folder)
    if is_reward and (others := set(recipes) - {"reward"}):
        what = f"is a reward model, but {min(others)} trains a language model"
        raise UserError(folder, what, "give the language model as --model")
    tokenizer, parsed = load_tokenizer(folder), read_json(folder / "tokenizer.json")
    vocabulary = parsed["model"].get("vocab")
    unknown = parsed["model"].get("unk_id")  # of Unigram; the others name it
    if isinstance(vocabulary, dict):
        unknown = vocabulary.get(parsed["model"].get("unk_token"))
    names = {token["content"] for token in parsed.get("added_tokens") or () if token.get("special")}
    names |= {tokenizer.decode([id], skip_special=False) for id in tokenizer.eos_ids}
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return Model(
        config, tokenizer, is_reward, parameters,
        bool(config.source.get("read_before_eos")) or tokenizer.spare_pad_token() is None,
        re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
        None if unknown in tokenizer.eos_ids else unknown,
    )  # fmt: skip


def limits(config: CheckConfig, recipe: str, model: Model | None) -> tuple[int | None, str]:
    """(tokens of the longest row or, for ppo, prompt; what happens to longer ones)."""
    defaults = RECIPES[recipe].config
    overlong = config.overlong or defaults.overlong
    if recipe != "ppo":
        return config.max_length or defaults.max_length, overlong
    if overlong == "truncate_response":
        raise UserError("--overlong", f"is {overlong}", "prompts have no response to cut")
    if model is None:
        return config.max_length, overlong
    ppo = PPOConfig(max_new_tokens=config.max_new_tokens, max_prompt_length=config.max_length)
    return prompt_room(ppo, [pretrained.resolve(config.model)]), overlong


# ------------------------------------------------------------------------ rows as they stand there


def _warning(what: str, where: Sequence[str]) -> list[dict]:
    """[] where there is nothing to warn of."""
    return [{"what": what, "rows": len(where), "first": where[0]}] if where else []


def _strings(part: Part | None) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [turn["content"] for turn in part or () if isinstance(turn, dict)]


def _touch(prompt: Part | None, *answers: Part) -> bool:
    """Whether strings grow together: "Why?" and "Because". Not all scripts put blanks there."""
    if not isinstance(prompt, str):
        return False
    seams = (prompt[-1] + answer[0] for answer in answers)
    return any(seam.isascii() and not any(map(str.isspace, seam)) for seam in seams)


def raw_warnings(raw: Raw, model: Model | None) -> list[dict]:
    """What is odd about the rows themselves."""
    rows = list(zip(raw.where, raw.parts, raw.keys, strict=True))
    seen, twice = set(), []
    for where, _, key in rows:
        twice += [where] if key in seen else []
        seen.add(key)
    found = _warning("the same row as one before", twice)
    if raw.recipe == "reward":
        swapped = [where for where, _, (p, a, b) in rows if a != b and (p, b, a) in seen]
        found += _warning("a pair that stands there both ways round", swapped)
        below = [w for w, m in zip(raw.where, raw.margins, strict=True) if m is not None and m < 0]
        found += _warning("a negative margin: the rejected answer should win", below)
    odd = {
        "U+FFFD, which stands for text that could not be read": lambda text: "\ufffd" in text,
        "a turn without text": lambda text: not text.strip(),
    }
    if model is not None:
        odd["a control token's name, read as ordinary text"] = model.control_text.search
    for what, test in odd.items():
        hits = [w for w, parts, _ in rows if any(test(s) for p in parts for s in _strings(p))]
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


# ---------------------------------------------------------------------------------- rows as tokens


def _ids(example: Pair | Prompt | Text) -> tuple[list[int], ...]:
    """(prompt ids, response ids, ...)."""
    match example:
        case Pair():
            return example.prompt_ids, example.chosen_ids, example.rejected_ids
        case Text(ids=ids, prompt_length=length):
            return ids[:length], ids[length:]
    return (example.ids,)


def token_warnings(examples: list, model: Model, ended: bool) -> list[dict]:
    """What is odd about rows once they are ids; `ended`: answers should end with eos."""
    unknown, bos, eos_ids = model.unknown_id, model.tokenizer.bos_id, model.tokenizer.eos_ids
    twice, endless, lost, tokens, lost_tokens = [], [], [], 0, 0
    for example in examples:
        prompt, *answers = _ids(example)
        starts = [(prompt + answer)[:2] for answer in answers or [[]]]
        if [bos, bos] in starts or (prompt and any(answer[0] == bos for answer in answers)):
            twice.append(example.where)
        if ended and not all(answer[-1] in eos_ids for answer in answers):
            endless.append(example.where)
        unknowns = sum(ids.count(unknown) for ids in (prompt, *answers))
        lost += [example.where] if unknowns else []
        lost_tokens += unknowns
        tokens += len(prompt) + sum(map(len, answers))
    found = _warning("the beginning-of-text token twice", twice)
    found += _warning("no eos at the end: nothing there teaches to stop", endless)
    return found + _warning(f"unknown tokens, {lost_tokens / tokens:.2%} of all tokens", lost)


def sample_rows(recipe: str, examples: list, tokenizer: Tokenizer | None) -> list[dict]:
    """The first, the shortest and the longest row: where faults show."""

    def text(ids: Sequence[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special=False)

    sizes = [sum(map(len, _ids(example))) for example in examples]
    picks = {int(np.argmax(sizes)): "longest", int(np.argmin(sizes)): "shortest", 0: "first"}
    rows = []
    for at in reversed(picks):
        sides = [
            {"side": side, "tokens": len(ids), "text": text(ids),
             "begins": [[id, text([id])] for id in ids[:2]],
             "ends": [[id, text([id])] for id in ids[2:][-3:]]}
            for side, ids in zip(RECIPES[recipe].sides, _ids(examples[at]), strict=True) if ids
        ]  # fmt: skip
        rows.append({"where": examples[at].where, "why": picks[at], "sides": sides})
    return rows


def _lengths(recipe: str, sizes: list[list[int]]) -> dict[str, np.ndarray]:
    """Side -> (N,) lengths; no "prompt" where all are empty."""
    columns = zip(RECIPES[recipe].sides, np.array(sizes, dtype=np.int64).T, strict=True)
    return {side: column for side, column in columns if side != "prompt" or column.any()}


def _whole(sizes: Iterable[list[int]]) -> np.ndarray:
    """(N,) tokens of each row's prompt with its longer answer."""
    return np.array([prompt + max(answers, default=0) for prompt, *answers in sizes])


def measure_tokens(raw: Raw, model: Model | None, most: int | None, overlong: str) -> Measured:
    """A file as its recipe reads it."""
    tokenizer = None if model is None else model.tokenizer
    before_eos = model is not None and raw.recipe == "reward" and model.before_eos

    def load(limit: int | None, overlong: str) -> tuple[list, Report, list[list[int]]]:
        examples, report = RECIPES[raw.recipe].load(raw.path, tokenizer, limit, overlong)
        if before_eos:
            examples = [without_eos(pair, tokenizer.eos_ids) for pair in examples]
        return examples, report, [list(map(len, _ids(example))) for example in examples]

    examples, report, sizes = load(None, "drop")
    lengths, whole, problem = _lengths(raw.recipe, sizes), _whole(sizes), None
    warnings = [] if model is None else token_warnings(examples, model, not before_eos)
    if most is not None and whole.max() > most:
        try:
            examples, report, sizes = load(most, overlong)
        except UserError as error:
            problem = error
    positions = None if model is None else model.config.longest_row
    if problem is None and positions is not None and (kept := _whole(sizes).max()) > positions:
        what = f"a row of {kept} tokens, the model reads {positions}"
        problem = UserError(raw.path, what, f"give --max-length {positions}")
    over = {name: {"tokens": limit, "rows_beyond": int((whole > limit).sum())}
            for name, limit in (("max_length", most), ("positions", positions))
            if limit is not None}  # fmt: skip
    samples = sample_rows(raw.recipe, examples, tokenizer)
    over["overlong"] = overlong
    return Measured(report, "tokens", lengths, over, samples, warnings, problem)


def measure_text(raw: Raw) -> Measured:
    """A file of text without a tokenizer."""
    equal = [len(key) == 3 and key[1] == key[2] for key in raw.keys]
    sizes = [
        [sum(map(len, _strings(part))) for part in parts]
        for parts, same in zip(raw.parts, equal, strict=True) if not same
    ]  # fmt: skip
    if not sizes:
        raise UserError(raw.path, f"no row left of {len(equal):,}", "chosen equals rejected in all")
    report = Report(raw.path, raw.detected, len(equal), len(sizes))
    if any(equal):
        report.dropped["chosen equals rejected"] = sum(equal)
    return Measured(report, "characters", _lengths(raw.recipe, sizes), None, [], [], None)


# --------------------------------------------------------------------------------------- the facts


def length_facts(lengths: dict[str, np.ndarray]) -> dict:
    """Minimum to maximum of each side, and a histogram whose last bin takes the long tail."""
    together = np.concatenate(list(lengths.values()))
    low, high = int(together.min()), int(np.quantile(together, 0.95))
    widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < BINS - 1)
    start = low // width
    slots = {side: np.minimum(v // width - start, BINS - 1) for side, v in lengths.items()}
    used = 1 + max(int(slot.max()) for slot in slots.values())
    edges = [(start + i) * width for i in range(used)]
    labels = [str(e) if width == 1 else f"{e:,}-{e + width - 1:,}" for e in edges]
    if together.max() >= edges[-1] + width:
        labels[-1] = f"{edges[-1]:,}+"
    counts = {side: np.bincount(slot, minlength=used).tolist() for side, slot in slots.items()}
    shape = {
        side: {"min": int(v.min()), "median": float(np.median(v)),
               "p95": int(np.quantile(v, 0.95, method="inverted_cdf")), "max": int(v.max())}
        for side, v in lengths.items()
    }  # fmt: skip
    return {"sides": shape, "bins": labels, "counts": counts}


def pair_facts(lengths: dict[str, np.ndarray], margins: list[float | None]) -> dict:
    """How far length alone tells which answer is preferred, and what the margins are like."""
    longer_by = lengths["chosen"] - lengths["rejected"]
    decided = int(np.count_nonzero(longer_by))
    given = [m for m in margins if m is not None]
    shape = (
        {"min": min(given), "median": float(np.median(given)), "max": max(given)} if given else {}
    )
    return {
        "longer_wins": int((longer_by > 0).sum()), "of_pairs": decided,
        "same_length": len(longer_by) - decided, "chosen_longer_by": float(longer_by.mean()),
        "margins": shape | {"missing": len(margins) - len(given)},
    }  # fmt: skip


def look(
    raw: Raw, first: Raw | None, model: Model | None, config: CheckConfig
) -> tuple[dict, Report, UserError | None]:
    """(all facts of a file as JSON can hold them, its report, what the recipe would refuse)."""
    if model is None and not raw.is_ids:
        seen = measure_text(raw)
    else:
        seen = measure_tokens(raw, model, *limits(config, raw.recipe, model))
    facts = {
        "recipe": raw.recipe, **asdict(seen.report), "unit": seen.unit,
        "different_prompts": len({key[0] for key in raw.keys if key[0] is not None}),
        "lengths": length_facts(seen.lengths), "limits": seen.limits, "samples": seen.samples,
    }  # fmt: skip
    warnings = raw_warnings(raw, model) + seen.warnings
    if raw.recipe == "reward":
        facts["pairs"] = pairs = pair_facts(seen.lengths, raw.margins)
        if pairs["of_pairs"] >= ENOUGH and pairs["longer_wins"] > LENGTH_BIAS * pairs["of_pairs"]:
            what = "the longer answer wins: a reward model may learn length alone"
            warnings.append({"what": what, "rows": pairs["longer_wins"], "first": None})
    turns = raw.parts[0][-1]
    if isinstance(turns, list) and isinstance(turns[0], dict) and model is not None:
        if model.tokenizer.template_origin == "plain fallback":
            warnings += _warning("written by a plain template, the model has none", raw.where)
    if first is not None:
        facts["shared"], more = overlap(raw, first)
        warnings += more
    return facts | {"warnings": warnings}, seen.report, seen.problem


# ---------------------------------------------------------------------------------------- in words


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def _show_sample(sample: dict) -> list[str]:
    lines = [f"  {sample['where']} ({sample['why']})"]
    for side in sample["sides"]:
        begins, ends = (
            " ".join(f"{printable(repr(word))}:{id}" if word else str(id) for id, word in side[end])
            for end in ("begins", "ends")
        )
        text = side["text"]
        text = printable(text, 10 * len(text) + 1)
        text = text + BOUNDARY if side["side"] == "prompt" else BOUNDARY + text
        if len(text) > 2 * WIDTH:
            text = f"{text[: WIDTH - 4]} ...{text[-WIDTH:]}"
        ids = f"{begins}{' ... ' if side['tokens'] > 5 else ' '}{ends}".rstrip()
        shown = [text[:WIDTH], text[WIDTH:], f"{side['tokens']:,} tokens: {ids}"]
        for label, line in zip_longest([side["side"]], filter(None, shown), fillvalue=""):
            lines.append(f"    {label:<10}{line}")
    return lines


def _show_lengths(facts: dict) -> list[str]:
    lengths = facts["lengths"]
    lines = [
        f"  {facts['unit']:<14}" + "".join(f"{w:>10}" for w in ("min", "median", "p95", "max"))
    ]
    for side, shape in lengths["sides"].items():
        lines.append(f"    {side:<12}" + "".join(f"{n:>10,.6g}" for n in shape.values()))
    heads = (f"{side:<{BAR + 10}}" for side in lengths["counts"])
    lines += ["", f"  {facts['unit']:<14}" + "".join(heads)]
    for i, label in enumerate(lengths["bins"]):
        bars = (
            f"{'#' * -(-counts[i] * BAR // max(counts)):<{BAR}}{counts[i]:>8,}  "
            for counts in lengths["counts"].values()
        )
        lines.append(f"    {label:<12}" + "".join(bars))
    beyond = {k: v for k, v in (facts["limits"] or {}).items() if k != "overlong"}
    for name, limit in beyond.items():
        then = f"; overlong: {facts['limits']['overlong']}" if name == "max_length" else ""
        share = _share(limit["rows_beyond"], facts["rows"])
        lines.append(f"  longer than {name} {limit['tokens']:,}: {share}{then}")
    return lines


def _show_pairs(pairs: dict) -> list[str]:
    lines, margins = [], pairs["margins"]
    if pairs["of_pairs"]:
        lines.append(
            f"  the longer answer wins {pairs['longer_wins'] / pairs['of_pairs']:.1%} of "
            f"{pairs['of_pairs']:,} pairs (equally long: {pairs['same_length']:,} more); "
            f"chosen - rejected: {pairs['chosen_longer_by']:+.1f}"
        )
    if "min" in margins:
        lines.append("  margins: " + ", ".join(f"{name} {x:,.4g}" for name, x in margins.items()))
    return lines


def show(facts: dict, report: Report) -> str:
    """The facts of a file as a person reads them, free of control characters."""
    lines = [*str(report).splitlines(), f"  for:      {facts['recipe']}"]
    if facts["different_prompts"]:
        lines.append(f"  prompts:  {facts['different_prompts']:,} different ones")
    if facts["samples"]:
        lines += ["", f"  rows as the model reads them; {BOUNDARY} is where the response begins"]
    for sample in facts["samples"]:
        lines += _show_sample(sample)
    lines += ["", *_show_lengths(facts)]
    lines += _show_pairs(facts["pairs"]) if "pairs" in facts else []
    if shared := facts.get("shared"):
        lines.append(f"  shared with {shared['with']}: {shared['rows']:,} rows, "
                     f"{shared['prompts_or_answers']:,} by prompt or answer")  # fmt: skip
    lines += [""] if facts["warnings"] else []
    for warning in facts["warnings"]:
        rows = f"{warning['rows']:,} row{'s' if warning['rows'] > 1 else ''}"
        at = f" (first: {warning['first']})" if warning["first"] else ""
        lines.append(f"  warning: {rows}: {warning['what']}{at}")
    return "\n".join(printable(line.rstrip(), 1000) for line in lines)


def show_model(model: Model) -> str:
    """What a folder holds, in three lines."""
    tokenizer, config = model.tokenizer, model.config
    kind = "reward model" if model.is_reward else "language model"
    ends = [f"{tokenizer.decode([id], skip_special=False)}:{id}" for id in tokenizer.eos_ids]
    lines = [
        str(tokenizer.folder),
        f"  {config.family} {kind}, {model.parameters:,} parameters, "
        f"reads {config.longest_row:,} tokens",
        f"  {tokenizer.vocab_size:,} token ids of {config.vocab_size:,} embedding rows, "
        f"eos {' '.join(ends) or 'none'}, chat template: {tokenizer.template_origin}",
    ]
    return "\n".join(printable(line, 1000) for line in lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    argv = ["--data", *files, *argv[len(files) :]] if files else argv
    config = settings.parse(
        CheckConfig, argv, "minirlhf check", "Look at data as a recipe will read it."
    )
    auto = config.recipe == "auto"
    recipes = [recipe_of(path) if auto else config.recipe for path in config.data]
    model = None if config.model is None else check_model(config.model, recipes)
    for recipe in recipes:
        limits(config, recipe, model)  # refuses before all rows are read
    if model is not None:
        print(show_model(model), end="\n\n")
    every, first, problems = [], None, []
    for path, recipe in zip(config.data, recipes, strict=True):
        raw = read_raw(path, recipe)
        facts, report, problem = look(raw, first, model, config)
        print(show(facts, report), end="\n\n")
        first = first or raw
        every.append(facts)
        problems += [problem] if problem else []
    if problems:
        raise problems[0]
    if config.json is not None:
        with open(config.json, "x", encoding="utf-8") as file:
            json.dump({"files": every}, file, indent=1, allow_nan=False)
    kept, rows = (sum(facts[name] for facts in every) for name in ("kept", "rows"))
    print(f"ok: {kept:,} of {rows:,} rows can be used")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
