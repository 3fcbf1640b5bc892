"""Text of strangers as HTML. What a model wrote is shown, never obeyed."""

from html import escape

from minirlhf.run.language import tell

HARMLESS = "\n\t\u200c\u200d"  # not printable, yet line breaks, and what joins emoji and letters


def shown(text: object, limit: int = 2000, language: str = "en") -> str:
    """Any text as HTML that displays it: markup is escaped, control characters and marks that turn
    the direction of writing are spelled; of what is longer than `limit` characters, the rest is
    counted.

    >>> shown("<b>\\x1b[31m\\u202e"), shown("aaaa", 2)
    ('&lt;b&gt;\\\\x1b[31m\\\\u202e', 'aa<span class="cut">… (2 characters cut)</span>')
    """
    text = text if isinstance(text, str) else str(text)
    kept = "".join(c if c.isprintable() or c in HARMLESS else _spelled(c) for c in text[:limit])
    rest = len(text) - limit
    more = tell("… ({count:,} characters cut)", language, count=rest) if rest > 0 else ""
    return escape(kept) + (f'<span class="cut">{more}</span>' if more else "")


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def conversation(prompt: object, limit: int = 2000, language: str = "en") -> str:
    """A prompt as HTML: a text, or the turns of a conversation, each behind its role."""
    turns = prompt if isinstance(prompt, list) else []
    if turns and all(isinstance(turn, dict) for turn in turns):
        prompt = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return shown(prompt, limit, language)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML; the first of a row is its name."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def folded(summary: str, inside: str) -> str:
    """A part that a click or a key opens."""
    return f"<details><summary>{summary}</summary>{inside}</details>"
