"""The facts of a data file and of a model in words, free of control characters."""

from itertools import zip_longest

from minirlhf.errors import printable
from minirlhf.files.sieve import Report
from minirlhf.tools.check.rows import Model

BAR = 12  # characters of a histogram's longest bar
WIDTH = 80  # characters in a line of a row's text, of which two are shown
SHOWN = 20  # rejected rows of a file
BOUNDARY = ">>>"  # stands where the prompt ends and the response begins


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


def _show_lists(lists: dict) -> str:
    count, tied = lists["responses"], lists["tied_pairs"]
    return (f"  lists:    {count['min']} to {count['max']} responses, median {count['median']:g}; "
            f"pairs of equal rank: {tied:,}")


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
    if "lists" in facts:
        lines.append(_show_lists(facts["lists"]))
    if facts["samples"]:
        lines += ["", f"  rows as the model reads them; {BOUNDARY} is where the response begins"]
    for sample in facts["samples"]:
        lines += _show_sample(sample)
    lines += ["", *_show_lengths(facts)]
    lines += _show_pairs(facts["pairs"]) if "pairs" in facts else []
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
