"""FORMAT.md is the specification: what it lists is what the code has."""

import re

from smoe.artifacts import tables
from smoe.artifacts.encodings import ENCODINGS
from smoe.artifacts.nested import TABLES
from smoe.artifacts.program import (
    ARITHMETIC,
    COMPARISONS,
    FORMS,
    LOGIC,
    OPS,
    REDUCTIONS,
    UNARY,
)


def _rows(text: str) -> dict[str, list[str]]:
    lines = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")
    ]
    return {
        cells[0].strip(): [cell.strip().replace("\\|", "|") for cell in cells[1:]]
        for cells in lines
    }


def test_the_tables_are_those_of_the_code(root):
    text = (root / "artifacts" / "FORMAT.md").read_text()
    written = _rows(text[text.index("## tables.safetensors") :])
    for name, table in (tables.TABLES | tables.BITS | tables.TRACE).items():
        assert written.pop(name) == [table.shape, table.dtype, table.unit, table.formula]
    assert set(written) == {"table"}
    study = _rows(text[text.index("## study/tables") : text.index("## study/trace")])
    assert set(study) - {"table"} == set(tables.names_in(study=True))


def test_the_operations_are_those_of_the_code(root):
    text = (root / "artifacts" / "FORMAT.md").read_text()
    section = text[text.index("### Operations") : text.index("## Shards")]
    rows = {name: row for name, row in _rows(section).items() if name != "operation"}
    assert list(rows) == list(OPS)
    for name, cells in rows.items():
        takes, gives, more = (re.sub(r"\[[^]]*\]", "", cell).split(", ") for cell in cells)
        given = [*filter(None, takes)], [*filter(None, gives)]
        for operands, names in zip(given, (OPS[name].inputs, OPS[name].outputs), strict=True):
            written = [text.split()[0].rstrip("?") + "?" * text.endswith("?") for text in operands]
            assert written == list(names)
        wanted = ["weight"] * OPS[name].weight + [*OPS[name].numbers, *OPS[name].names]
        assert [text.strip() for text in more if text] == wanted
    for how in UNARY + ARITHMETIC + LOGIC + COMPARISONS + REDUCTIONS:
        assert re.search(rf"\b{how}\b", section)


def test_the_forms_are_those_of_the_code(root):
    text = (root / "artifacts" / "FORMAT.md").read_text()
    section = text[text.index("### Constants") : text.index("### Operations")]
    assert set(_rows(section)) - {"form"} == set(FORMS)


def test_the_encodings_are_those_of_the_code(root):
    text = (root / "artifacts" / "FORMAT.md").read_text()
    section = text[text.index("### Records") : text.index("### nested")]
    assert set(_rows(section)) - {"encoding"} == {*ENCODINGS, "nested:…"}
    nested = text[text.index("### nested") : text.index("## tables.safetensors")]
    written = [_rows(part) for part in re.split(r"^\| n \| values", nested, flags=re.M)[1:]]
    for rows, table in zip(written, TABLES.values(), strict=True):
        assert {n: tuple(map(int, rows[str(n)][0].split())) for n in table} == table
