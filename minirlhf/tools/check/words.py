"""The facts of a data file and of a model in words, free of control characters."""

from itertools import zip_longest

from minirlhf.errors import printable
from minirlhf.files.folders import weights_of
from minirlhf.files.sieve import Report
from minirlhf.tools.check.facts import Model

BAR = 12  # characters of a histogram's longest bar
WIDTH = 80  # characters in a line of a row's text, of which two are shown
SHOWN = 20  # rejected rows of a file
READERS = {  # of rows that more than one recipe reads
    "reward": "reward; also --recipe dpo",
    "ppo": "ppo; also --recipe grpo and distill",
}
BOUNDARY = ">>>"  # stands where the prompt ends and the response begins


def _lines(lines: list[str]) -> str:
    return "\n".join(printable(line.rstrip(), 1000) for line in lines)


def _sample(sample: dict) -> list[str]:
    lines = [f"  {sample['where']} ({sample['why']})"]
    for part in sample["parts"]:
        begins, ends = (
            " ".join(f"{printable(repr(word))}:{id}" if word else str(id) for id, word in part[end])
            for end in ("begins", "ends")
        )
        text = printable(part["text"], 10 * len(part["text"]) + 1)
        text = text + BOUNDARY if part["part"] == "prompt" else BOUNDARY + text
        if len(text) > 2 * WIDTH:
            text = f"{text[: WIDTH - 4]} ...{text[-WIDTH:]}"
        ids = f"{begins}{' ... ' if part['tokens'] > 5 else ' '}{ends}".rstrip()
        shown = [text[:WIDTH], text[WIDTH:], f"{part['tokens']:,} tokens: {ids}"]
        for label, line in zip_longest([part["part"]], filter(None, shown), fillvalue=""):
            lines.append(f"    {label:<10}{line}")
    return lines


def _lengths(unit: str, lengths: dict) -> list[str]:
    heads = "".join(f"{word:>10}" for word in ("min", "median", "p95", "max"))
    lines = ["", f"  {unit:<14}{heads}"]
    for name, shape in lengths["parts"].items():
        lines.append(f"    {name:<12}" + "".join(f"{n:>10,.6g}" for n in shape.values()))
    counts = lengths["counts"]
    lines += ["", f"  {unit:<14}" + "".join(f"{name:<{BAR + 10}}" for name in counts)]
    for i, label in enumerate(lengths["bins"]):
        bars = (f"{'#' * -(-n[i] * BAR // max(n)):<{BAR}}{n[i]:>8,}  " for n in counts.values())
        lines.append(f"    {label:<12}" + "".join(bars))
    return lines


def _limits(limits: dict, rows: int) -> list[str]:
    overlong = {"max_length": f"; overlong: {limits.get('overlong')}"}
    return [
        f"  longer than {name} {limit['tokens']:,}: {limit['rows_beyond']:,} "
        f"({limit['rows_beyond'] / rows:.1%}){overlong.get(name, '')}"
        for name, limit in limits.items() if name != "overlong"
    ]


def _pairs(pairs: dict) -> list[str]:
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
    """The facts of a file as a person reads them."""
    readers = READERS.get(facts["recipe"], facts["recipe"])
    lines = [*str(report).splitlines(), f"  for:      {readers}"]
    if facts["different_prompts"]:
        lines.append(f"  prompts:  {facts['different_prompts']:,} different ones")
    if lists := facts.get("lists"):
        n = lists["responses"]
        lines.append(f"  lists:    {n['min']} to {n['max']} responses, median {n['median']:g}; "
                     f"pairs of equal rank: {lists['tied_pairs']:,}")
    if facts["samples"]:
        told = f"  rows as the model reads them; {BOUNDARY} is where the response begins"
        told += ", <<< where nothing is learned" if facts["gaps"] else ""
        lines += ["", told]
    for sample in facts["samples"]:
        lines += _sample(sample)
    lines += _lengths(facts["unit"], facts["lengths"])
    lines += _limits(facts["limits"] or {}, facts["rows"])
    lines += _pairs(facts["pairs"]) if "pairs" in facts else []
    left_out = facts["rejected_rows"]
    lines += ["", "  rejected rows"] if left_out else []
    lines += [f"  {row['where']}: {row['reason']}: {row['raw']}" for row in left_out[:SHOWN]]
    lines += [f"  and {len(left_out) - SHOWN:,} more"] if len(left_out) > SHOWN else []
    if shared := facts.get("shared"):
        lines.append(f"  shared with {shared['with']}: {shared['rows']:,} rows, "
                     f"{shared['prompts_or_answers']:,} by prompt or answer")
    lines += [""] if facts["warnings"] else []
    for warning in facts["warnings"]:
        rows = f"{warning['rows']:,} row{'s' if warning['rows'] > 1 else ''}"
        lines.append(f"  warning: {rows}: {warning['what']} (first: {warning['first']})")
    return _lines(lines)


def show_model(model: Model) -> str:
    """What a folder holds, in three lines."""
    tokenizer, config = model.tokenizer, model.config
    kind, base = "reward" if model.is_reward else "language", weights_of(model.folder)
    ends = [f"{tokenizer.decode([id], skip_special=False)}:{id}" for id in tokenizer.eos_ids]
    return _lines([
        str(model.folder) + (f", an adapter of {base}" if base != model.folder else ""),
        f"  {config.family} {kind} model, {model.parameters:,} parameters, "
        f"reads {config.longest_row:,} tokens",
        f"  {tokenizer.vocab_size:,} token ids of {config.vocab_size:,} embedding rows, "
        f"eos {' '.join(ends) or 'none'}, chat template: {tokenizer.template_origin}",
    ])
