"""Pictures: what is drawn is what was measured."""

import json

import pytest

from bench import harness, pictures
from bench.harness import Record, Table

LIMITS = Table(
    "outofcore",
    dict.fromkeys(("memory of the process", "smoe, tokens per second", "llama.cpp", "ratio"), "{}"),
    [["no limit", 110, 100, 1.1], ["26 MB (25 %)", 80, None, None]],
)


def test_the_picture_has_a_place_for_each_limit_and_a_gap_where_nothing_ran():
    record = Record("outofcore", "", "", "", {}, {}, [LIMITS])
    places, rates = pictures.limits(json_round_trip(record))
    assert places == ["no limit", "26 MB (25 %)"]
    assert rates == {"smoe": [110, 80], "llama.cpp": [100, None]}


def json_round_trip(record):
    data = json.loads(json.dumps(harness.asdict(record)))
    return Record(**data | {"tables": [Table(**table) for table in data["tables"]]})


def test_the_picture_is_svg(tmp_path):
    pytest.importorskip("matplotlib")
    record = Record("outofcore", "", "", "", {}, {}, [LIMITS])
    pictures.draw_limits(record, tmp_path / "p.svg")
    assert "Tokens per second" in (tmp_path / "p.svg").read_text()
    pictures.draw_decoding(DECODED, tmp_path / "d.svg")
    assert "with 2 threads" in (tmp_path / "d.svg").read_text()


DECODED = Record(
    "decoding", "", "", "", {}, {},
    [
        Table(
            "decoding",
            dict.fromkeys(("threads", "engine", "at 50", "of it", "at 1500"), "{}"),
            [[1, "program", 20.0, 0.8, 18.0], [2, "program", 30.0, 0.7, 25.0],
             [2, "llama.cpp", 28.0, 0.6, 17.0]],
        )
    ],
)  # fmt: skip


def test_a_picture_of_decoding_has_what_was_measured():
    positions, rates = pictures.decoded(json_round_trip(DECODED))
    assert positions == [50, 1500]
    assert rates == {
        "program": {1: [20.0, 18.0], 2: [30.0, 25.0]},
        "llama.cpp": {2: [28.0, 17.0]},
    }
