"""minirlhf/data/README.md: each row that it shows is read as it says."""

import json
import re
from pathlib import Path

import pytest

import minirlhf.data
from minirlhf.data.arguments import ARGUMENTS
from minirlhf.data.examples import load_prompts, load_texts
from minirlhf.data.published import SHAPES
from minirlhf.data.rankings import load_preferences

PAGE = (Path(minirlhf.data.__file__).parent / "README.md").read_text("utf-8")
LOAD = {"Texts": load_texts, "Preferences": load_preferences, "Prompts": load_prompts}
ROWS = [  # (first word of the heading, a row in its section)
    (section.split(",")[0], row)
    for section in PAGE.split("\n## ")
    for block in re.findall(r"^```json\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for row in block.splitlines()
]


@pytest.mark.parametrize(("kind", "row"), ROWS)
def test_a_row_of_the_page_is_read(kind, row, tokenizer, write):
    examples, report = LOAD[kind](write(json.loads(row)), tokenizer, None, "drop")
    assert report.kept == 1
    carried = json.loads(row).keys() & {"answer", *ARGUMENTS}
    assert len(report.notes) == bool(carried)
    assert examples[0].columns.keys() == carried


def test_the_page_shows_each_kind():
    assert {kind for kind, _ in ROWS} == LOAD.keys() and len(ROWS) == 24


def test_the_page_names_each_published_shape_and_what_tells_it():
    table = PAGE.split("\n## Data sets")[1].split("\n## ")[0]
    lines = [line.split(" | ")[:2] for line in re.findall(r"^\| (.*`.*)$", table, re.MULTILINE)]
    told = {name: {*re.findall("`([^`]+)`", columns)} for name, columns in lines}
    assert told.keys() == {shape.name.split(" by ")[0] for shape in SHAPES}
    for shape in SHAPES:
        assert {*shape.needs} <= told[shape.name.split(" by ")[0]]
