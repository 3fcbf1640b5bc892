"""A run on one page: report.html, made from the files of its folder alone.

In order: record.py (what a folder holds, read whatever state it is in), curves.py (a metric as an
SVG picture), markup.py (text of strangers as HTML), texts.py (responses, pairs and the heat of
their tokens), page.py (the page) and style.py (its looks). Recipes end with `write_report` of
page.py; `minirlhf report` puts several runs on a page.
"""
