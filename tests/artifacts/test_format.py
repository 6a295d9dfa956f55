"""FORMAT.md is the specification: what it lists is what the code has."""

import re

from smoe.artifacts import tables
from smoe.artifacts.encodings import ENCODINGS
from smoe.artifacts.nested import TABLES


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
    for name, table in (tables.TABLES | tables.TRACE).items():
        assert written.pop(name) == [table.shape, table.dtype, table.unit, table.formula]
    assert set(written) == {"table"}
    study = _rows(text[text.index("## study/tables") : text.index("## study/trace")])
    assert set(study) - {"table"} == set(tables.names_in(study=True))


def test_the_encodings_are_those_of_the_code(root):
    text = (root / "artifacts" / "FORMAT.md").read_text()
    section = text[text.index("### Records") : text.index("### nested")]
    assert set(_rows(section)) - {"encoding"} == {*ENCODINGS, "nested:…"}
    nested = text[text.index("### nested") : text.index("## tables.safetensors")]
    written = [_rows(part) for part in re.split(r"^\| n \| values", nested, flags=re.M)[1:]]
    for rows, table in zip(written, TABLES.values(), strict=True):
        assert {n: tuple(map(int, rows[str(n)][0].split())) for n in table} == table
