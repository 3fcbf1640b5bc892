"""The page: report.html, one file without scripts that asks for nothing else."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from html import escape
from math import isnan

from minirlhf import __version__, ranks
from minirlhf.errors import UserError, printable
from minirlhf.evaluation.report import texts
from minirlhf.evaluation.report.curves import BUCKETS, picture, told
from minirlhf.evaluation.report.markup import folded, shown, table
from minirlhf.evaluation.report.record import RunRecord, number, read_run
from minirlhf.evaluation.report.style import style
from minirlhf.run.folder import Run
from minirlhf.run.glossary import definition, translated
from minirlhf.run.language import tell
from minirlhf.run.resume import OF_THE_START

FILE = "report.html"
START = '<meta charset="utf-8"><meta name="generator" content="minirlhf report">'
MOST = 8  # runs on a page: as many colours as can be told apart
FIRST = {  # what evaluation/README.md says to look at first; the other numbers are folded
    "ppo": ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy",
            "policy/approxkl_avg", "policy/clipfrac_avg", "health/explained_variance",
            "health/eos_rate", "response_length"),
    "grpo": ("reward", "objective/kl", "entropy", "frac_reward_zero_std", "policy/approxkl_avg",
             "clip_ratio/region_mean", "completions/clipped_ratio", "completions/mean_length"),
    "reward": ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "grad_norm"),
    "sft": ("loss", "mean_token_accuracy", "eval_loss", "eval_perplexity", "grad_norm",
            "learning_rate"),
    "dpo": ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected",
            "eval_rewards/accuracies"),
    "distill": ("loss", "eval/kl", "eval/forward_kl", "completions/clipped_ratio", "grad_norm"),
}
FACTS = ("model", "data", "reward", "eval_data", "batch_size", "learning_rate", "seed")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
FAULTS = (UserError, OSError, ArithmeticError, AttributeError, LookupError, MemoryError,
          RuntimeError, TypeError, ValueError)


def write_report(r: Run) -> None:
    """The page of a run that is done, in its folder. The run has succeeded: what goes wrong here is
    told in a line and spoils nothing."""
    if r.config.dry_run:
        return
    try:
        ranks.from_first(lambda: r.write_file(FILE, page([read_run(r.folder)])))
        r.done("report", r.folder / FILE)
    except FAULTS as error:
        what = f"{type(error).__name__}: {printable(error)}"
        r.display.note(f"warning: {FILE} could not be written: {what}; the run itself is whole")


def page(runs: Sequence[RunRecord], language: str = "en") -> str:
    """The HTML of one run, or of several side by side.

    Raises:
        UserError: more than MOST runs.
    """
    if len(runs) > MOST:
        raise UserError("report", f"{len(runs)} runs", f"give at most {MOST}: one colour each")
    title = escape(printable(", ".join(run.name for run in runs), 160))
    parts = (
        ("What differs", differences(runs, language)),
        ("Warnings", warnings(runs, language)),
        ("What the model is worth", each(runs, worth, language)),
        ("Curves over the steps", curves(runs, language)),
        ("Responses", each(runs, responses, language)),
        ("Tokens", each(runs, texts.heat_maps, language)),
        ("Pairs", each(runs, texts.of_pairs, language)),
        ("Settings and how to repeat it", each(runs, repeat, language)),
    )
    sections = "".join(
        f"<section><h2>{tell(head, language)}</h2>{inside}</section>"
        for head, inside in parts if inside
    )
    made = tell("Made by minirlhf {version} from the files of the run's folder alone.", language,
                version=__version__)
    return "\n".join((
        f'<!doctype html><html lang="{"zh-CN" if language == "zh" else language}"><head>{START}',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title} · minirlhf</title><style>{style()}</style></head><body>",
        f"<header><h1>{title}</h1>{heads(runs, language)}</header><main>{sections}</main>",
        f"<footer>{made}{unread(runs, language)}</footer></body></html>",
    )) + "\n"


# ---- facts ---------------------------------------------------------------------------------------


def fact_rows(run: RunRecord, language: str) -> dict[str, str]:
    """What a run is, as HTML by its name."""
    rows = {tell("recipe", language): run.recipe,
            tell("state", language): tell(run.state, language, step=run.step)}
    for name in FACTS:
        if (value := run.settings.get(name)) not in (None, [], ""):
            rows[name.replace("_", " ")] = setting(value, 200)
    seconds, memory = (run.series.get(name) for name in ("elapsed", "peak_memory"))
    if seconds and seconds.last is not None:
        rows[tell("time since its last start", language)] = f"{told(round(seconds.last, 1))} s"
    if memory and memory.last is not None:
        rows[tell("peak memory", language)] = f"{memory.last:.2f} GB"
    versions = run.facts.get("versions")
    if isinstance(versions, dict):
        told_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
        rows[tell("versions", language)] = shown(told_versions, 120)
    return rows


def heads(runs: Sequence[RunRecord], language: str) -> str:
    """The facts: of one run as a list, of several beside each other, with their colours."""
    facts = [fact_rows(run, language) for run in runs]
    if len(runs) == 1:
        items = "".join(f"<div><dt>{name}</dt><dd>{v}</dd></div>" for name, v in facts[0].items())
        return f'<dl class="facts">{items}</dl>'
    names = dict.fromkeys(name for rows in facts for name in rows)
    rows = [[name, *(rows.get(name, "–") for rows in facts)] for name in names]
    return table(["", *(key(k, run) for k, run in enumerate(runs))], rows)


def key(k: int, run: RunRecord) -> str:
    """A run's name behind the line that it is drawn with."""
    return f'<span class="key run{k}"></span>{shown(run.name, 60)}'


def setting(value: object, limit: int = 300) -> str:
    """A setting's value as HTML."""
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    return shown({None: "none", True: "on", False: "off"}.get(value, value)
                 if isinstance(value, bool | None) else value, limit)


def differences(runs: Sequence[RunRecord], language: str) -> str:
    """The settings in which runs differ; folded, those that not all of their recipes have."""
    if len(runs) < 2:
        return ""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows: dict[bool, list[list[str]]] = {True: [], False: []}
    for name in names:
        there = [name in run.settings for run in runs]
        cells = [setting(r.settings[name]) if name in r.settings else "–" for r in runs]
        if name not in OF_THE_START and len(set(cells)) > 1:
            rows[all(there)].append([shown(name, 60), *cells])
    head = ["", *(key(k, run) for k, run in enumerate(runs))]
    what = table(head, rows[True]) if rows[True] else (
        f"<p>{tell('All settings that the runs share agree.', language)}</p>"
    )
    more = tell("Settings of some of the recipes ({count})", language, count=len(rows[False]))
    return what + (folded(more, table(head, rows[False])) if rows[False] else "")


# ---- warnings ------------------------------------------------------------------------------------


def warnings(runs: Sequence[RunRecord], language: str) -> str:
    """The alarms of each run with their advice."""
    found = []
    for run in runs:
        whose = f"{shown(run.name, 60)}: " if len(runs) > 1 else ""
        for alarm in run.alarms or ():
            at = tell("step {step}", language, step=alarm.step)
            found.append(f'<div class="card alarm"><h3>{whose}{escape(alarm.name)}, {at}</h3>'
                         f"<p>{escape(alarm.told(language))}</p></div>")
        if run.alarms is None and run.recipe in ("ppo", "grpo", "dpo"):
            what = "Unknown: there is no checkpoint that tells of them, and no line for each step."
            found.append(f"<p>{whose}{tell(what, language)}</p>")
        elif run.alarms == [] and run.recipe in ("ppo", "grpo", "dpo"):
            what = "None up to step {step:,}."
            found.append(f"<p>{whose}{tell(what, language, step=run.told)}</p>")
    return "".join(found)


# ---- curves --------------------------------------------------------------------------------------


def curves(runs: Sequence[RunRecord], language: str) -> str:
    """Each number of the logs over the steps, the important ones first."""
    names = sorted({name for run in runs for name in run.series})
    first = dict.fromkeys(n for run in runs for n in FIRST[run.recipe] if n in names)
    legend = ""
    if len(runs) > 1:
        keys = "".join(f"<li>{key(k, run)}</li>" for k, run in enumerate(runs))
        legend = f'<ul class="legend">{keys}</ul>'
    if not names:
        return f"<p>{tell('There is nothing to draw yet.', language)}</p>"
    rest = [name for name in names if name not in first]
    shares = BUCKETS // len(runs), BUCKETS // 3 // len(runs)
    blocks = [
        f'<div class="grid-of">{"".join(figure(n, runs, language, buckets) for n in some)}</div>'
        for some, buckets in zip((first, rest), shares, strict=True)
    ]
    more = tell("All other numbers of the log ({count})", language, count=len(rest))
    return legend + blocks[0] + (folded(more, legend + blocks[1]) if rest else "")


def figure(name: str, runs: Sequence[RunRecord], language: str, buckets: int) -> str:
    """One number of every run that has it: picture, last value, unit, meaning."""
    series = [run.series.get(name) for run in runs]
    lasts = {k: told(s.last) for k, s in enumerate(series) if s is not None}
    unit, meanings = units_and_meanings(name, runs, language)
    label = printable(f"{name}: {', '.join(lasts.values())} {unit}")
    drawn = picture(series, label, buckets)
    notes = list(notes_on(series, buckets, language))
    if not drawn:
        notes.append(tell("No value is finite.", language))
    under = "".join(f"<p>{note}</p>" for note in (*meanings, *notes))
    alone = f"<b>{lasts[0]}</b>" if len(runs) == 1 else ""
    each = "".join(f'<li><span class="key run{k}"></span>{v}</li>' for k, v in lasts.items())
    each = "" if alone else f'<ul class="lasts">{each}</ul>'
    return (f'<figure><div class="top"><h3>{shown(name, 80)}</h3>{alone}</div>'
            f'<div class="unit">{escape(unit)}</div>{drawn}{each}<figcaption>{under}</figcaption>'
            "</figure>")


def units_and_meanings(
    name: str, runs: Sequence[RunRecord], language: str
) -> tuple[str, list[str]]:
    """The unit of a number, and what it means in the recipes of the runs that have it."""
    recipes = dict.fromkeys(run.recipe for run in runs if name in run.series)
    found = {recipe: definition(recipe, name) for recipe in recipes}
    if not any(found.values()):
        return "", [tell("The glossary does not know this number.", language)]
    metrics = {r: translated(metric, language) for r, metric in found.items() if metric}
    meanings = {
        recipe: tell("{reduction} over {over}: {meaning}.", language, reduction=m.reduction,
                     over=m.over, meaning=m.meaning) for recipe, m in metrics.items()
    }
    units = " / ".join(dict.fromkeys(m.unit for m in metrics.values()))
    if len(set(meanings.values())) == 1:
        sentence = next(iter(meanings.values()))
        return units, [escape(sentence[:1].upper() + sentence[1:])]
    return units, [escape(f"{recipe}: {text}") for recipe, text in meanings.items()]


def notes_on(series: Sequence, buckets: int, language: str) -> Iterator[str]:
    """What the picture does not show by itself."""
    there = [s for s in series if s is not None]
    if gaps := sum(s.gaps for s in there):
        yield tell("{count:,} values are not finite: gaps in the curve.", language, count=gaps)
    if (most := max(len(s.values) for s in there)) > 2 * buckets:
        yield tell("Of {count:,} values, the lowest and the highest of each of {buckets} stretches "
                   "are drawn.", language, count=most, buckets=buckets)


# ---- texts and the end ---------------------------------------------------------------------------


def each(
    runs: Sequence[RunRecord], part: Callable[[RunRecord, str], str], language: str
) -> str:
    """A part of the page for every run that has it, several behind their names."""
    found = [(run, inside) for run in runs if (inside := part(run, language))]
    if len(runs) == 1:
        return "".join(inside for _, inside in found)
    return "".join(folded(shown(run.name, 60), inside) for run, inside in found)


def responses(run: RunRecord, language: str) -> str:
    """What the policy wrote, at first and at last."""
    return texts.before_and_after(run, language) + texts.of_rollouts(run, language)


WORTH = {  # of card.json, by what it is called here
    "accuracy": "accuracy", "95% interval": "accuracy_95", "ties": "ties", "pairs": "pairs",
    "calibration error": "calibration_error", "correlation of score and length":
    "length_score_pearson",
}


def worth(run: RunRecord, language: str) -> str:
    """Of a reward model: what its card says of each held-out set, in a line."""
    sets = run.card.get("sets") if run.card else None
    if not isinstance(sets, dict):
        return ""
    rows = [
        [shown(name, 60), *(cell(numbers.get(of)) for of in WORTH.values())]
        for name, numbers in sets.items() if isinstance(numbers, dict)
    ]
    more = tell("card.md in the run's folder says more.", language)
    return table(["", *(tell(name, language) for name in WORTH)], rows) + f"<p>{more}</p>"


def cell(value: object) -> str:
    """A number of the card, or the two ends of an interval."""
    if isinstance(value, list):
        return " – ".join(cell(part) for part in value[:2])
    value = number(value)
    return told(None if value is None or isnan(value) else value)


def repeat(run: RunRecord, language: str) -> str:
    """The command that repeats the run, the one that started it, and all settings."""
    again = shlex.join(["minirlhf", "rerun", printable(run.folder, 4000)])
    parts = [f"<p>{tell('To repeat it with the same settings', language)}</p>",
             f"<pre><code>{shown(again, 4000, language)}</code></pre>"]
    if isinstance(given := run.facts.get("command"), str):
        given = re.sub("^__main__.py ", "python -m minirlhf ", given)
        parts += [f"<p>{tell('It was started by', language)}</p>",
                  f"<pre><code>{shown(given, 4000, language)}</code></pre>"]
    rows = [[shown(name, 60), setting(value)] for name, value in run.settings.items()]
    parts.append(folded(tell("All settings ({count})", language, count=len(rows)),
                        table([tell("setting", language), tell("its value", language)], rows)))
    return "".join(parts)


def unread(runs: Sequence[RunRecord], language: str) -> str:
    """What of the logs the page does not know."""
    told_of = []
    if broken := sum(run.broken for run in runs):
        told_of.append(tell("{count:,} lines of the logs could not be read (the last one of a run "
                            "that was killed may be half).", language, count=broken))
    if skipped := sum(run.unread for run in runs):
        told_of.append(tell("The middle of samples.jsonl, {count:,} bytes, was passed over.",
                            language, count=skipped))
    return "".join(f"<br>{text}" for text in told_of)
