"""Tables of the documents, made from the records in docs/figures.

    <!-- table: NAME FILE -->      the table NAME of docs/figures/FILE, as Markdown
    <!-- source: FILE -->          the command, machine, commit and date that gave it, as one line
    <!-- end -->

Whatever stands between a marker and its end is replaced; `python -m bench tables` rewrites, and a
test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bench.harness import ROOT, Record, read_record

FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"(<!-- (table|source): ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.S)


def documents() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str, figures: Path = FIGURES) -> str:
    """The text with every marked block made anew. A `ValueError` names the marker that cannot be
    followed."""

    def block(match: re.Match[str]) -> str:
        start, kind, words, _, end = match.groups()
        return f"{start}{_content(kind, words.split(), figures)}\n{end}"

    return BLOCK.sub(block, text)


def rewrite() -> Iterator[str]:
    """Rewrite all documents; a line for each that changed."""
    for document in documents():
        before = document.read_text("utf-8")
        after = rewritten(before)
        if after != before:
            document.write_text(after, "utf-8")
            yield f"{document.relative_to(ROOT)}: rewritten"


def _content(kind: str, words: list[str], figures: Path) -> str:
    if len(words) != (2 if kind == "table" else 1):
        raise ValueError(f"<!-- {kind}: {' '.join(words)} -->: a table has a name and a file.")
    file = figures / words[-1]
    if not file.is_file():
        raise ValueError(f"<!-- {kind}: {' '.join(words)} -->: there is no {file}.")
    record = read_record(file)
    return record.table(words[0]).markdown() if kind == "table" else source(record)


def source(record: Record) -> str:
    """Where a record's figures come from, in one line."""
    cpu, cores = record.machine.get("cpu", ""), record.machine.get("cores")
    machine = f"{cores} cores of {cpu}" if cores else cpu
    parts = [f"`{record.command}`", machine, f"commit {record.commit}" if record.commit else "",
             record.date, record.note]  # fmt: skip
    return ", ".join(part for part in parts if part) + "."
