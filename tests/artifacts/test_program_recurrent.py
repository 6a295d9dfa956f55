"""The door of programs, where they carry something from token to token: what is changed in it is
refused with a sentence."""

import json

import pytest
from support.tables import opened, pico

from smoe.artifacts import BundleError
from smoe.artifacts.program import scans

WHOLE, DATA, MANIFEST = pico()
PART = 2  # which has all such operations


def first(table: dict, kind: str) -> dict:
    return next(op for op in table["parts"][PART]["ops"] if op["kind"] == kind)


def changed(kind: str, *path_and_value):
    *path, key, value = path_and_value

    def change(table: dict) -> None:
        held = first(table, kind)
        for step in path:
            held = held[step]
        held[key] = value

    return change


def moved(kind: str, place: int):
    def change(table: dict) -> None:
        ops = table["parts"][PART]["ops"]
        op = ops.pop(ops.index(first(table, kind)))
        ops.insert(len(ops) if place < 0 else place, op)

    return change


def doubled(kind: str, into: int = PART):
    def change(table: dict) -> None:
        table["parts"][into]["ops"].append(first(table, kind))

    return change


BROKEN = {
    "a carried state of no segment": (
        lambda t: t["recurrent"][0].update(segment=9),
        "'delta' is of part 9, which is not known",
    ),
    "a carried state of other numbers": (
        lambda t: t["recurrent"][0].update(shape=[2, 5, 5]),
        r"'delta', \[2, 5, 5\] in segment 2, is not one of",
    ),
    "a carried state that grows": (
        lambda t: t["recurrent"][0].update(name="keys.1", shape=[2, 5, 10]),
        "'keys.1', .2, 5, 10. in segment 2, is not one of",
    ),
    "a carried state of negative sizes": (
        lambda t: t["recurrent"][0].update(shape=[-2, -5, 4]),
        r"'delta', \[-2, -5, 4\]",
    ),
    "a carried state that is lacking": (
        lambda t: t["recurrent"].pop(),
        "part 2 lacks the state 'mean'",
    ),
    "a carried state that nothing replaces": (
        lambda t: t["parts"][2]["ops"].remove(first(t, "delta_rule")),
        "'found' what was not written|nothing replaces the state 'delta'",
    ),
    "a carried state that is replaced twice": (
        doubled("convolution"),
        "'taps' is .*used twice",
    ),
    "a carried state that is recalled twice": (doubled("recall"), "'mean' is .*used twice"),
    "a carried state that is stored twice": (doubled("store"), "'mean' is not recalled"),
    "a carried state of another part": (doubled("delta_rule", 3), "is of another segment"),
    "a carried state that is not stored": (
        lambda t: t["parts"][2]["ops"].remove(first(t, "store")),
        "between a recall and its store|does not store the state 'mean'",
    ),
    "a store before its recall": (moved("recall", -1), "what was not written"),
    "a product in a scan": (moved("store", -1), "it lies between a recall and its store"),
    "a delta rule of other heads": (
        lambda t: t["recurrent"][0].update(shape=[1, 10, 4]),
        r"q is f32 \[2, 5\], f32 \[1, 10\] was wanted",
    ),
    "a delta rule of a flat state": (
        lambda t: t["recurrent"][0].update(shape=[40]),
        "its state has 1 axes, heads of keys by values",
    ),
    "a delta rule of turned keys": (
        changed("delta_rule", "inputs", 1, "strides", [1, 2]),
        "k has strides .1, 2., with gaps",
    ),
    "a convolution of more tokens than there are": (
        lambda t: t["recurrent"][1].update(shape=[1, 24]),
        "it takes 3 tokens, and its state has 1",
    ),
    "a convolution with weights of a row": (
        changed(
            "convolution",
            "inputs",
            2,
            {
                "source": "smooth",
                "offset": 0,
                "shape": [6],
                "strides": [1],
            },
        ),
        "bias is a buffer, a constant was wanted|what was not written",
    ),
    "a store of another shape": (
        changed(
            "store",
            "inputs",
            0,
            {
                "source": "mean.new",
                "offset": 0,
                "shape": [5],
                "strides": [1],
            },
        ),
        r"x is f32 \[5\], f32 \[6\] was wanted",
    ),
    "a name for keys": (changed("recall", "names", "state", "keys.1"), "the name of a state was"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_carried_in_another_way_is_refused(name):
    change, expected = BROKEN[name]
    table = json.loads(WHOLE.to_json())
    change(table)
    with pytest.raises(BundleError, match=expected):
        opened(table)


def test_a_scan_is_what_lies_between_recalls_and_their_stores():
    ops = WHOLE.parts[PART].ops
    (scan,) = scans(ops)
    assert [ops[place].kind for place in scan] == ["recall", "unary", "binary", "store"]
