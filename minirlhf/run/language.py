"""What is told to people in another language: a table of English sentences and their translations.

The English sentence in the code is the key, so who reads the code reads what users see, and zh.tsv
is what a translator edits. `{names}` in a sentence are filled in after it was translated.
"""

from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")


@cache
def translations(language: str) -> dict[str, str]:
    """English sentence -> its translation."""
    lines = Path(__file__).with_name(f"{language}.tsv").read_text("utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def tell(sentence: str, language: str = "en", **values: object) -> str:
    """The sentence in a language, with its values.

    >>> tell("step {step}", "zh", step=3)
    '第 3 步'

    Raises:
        KeyError: the table lacks the sentence; tests hold that it has each that is told.
    """
    told = sentence if language == "en" else translations(language)[sentence]
    return told.format(**values)
