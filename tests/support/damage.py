"""Does a damaged table of a program ever do more than say so?

Random damage to the pico program (`support/tables.py`): numbers replaced by near and absurd ones,
wrong kinds, shapes, names and types, views that overlap, operations that are moved, doubled,
dropped or read what comes later, deep nesting, and bytes flipped in the text. Each table ends at
the door with a sentence, or it still is a program, and `run` may run it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from smoe.artifacts import BundleError, Manifest, schema
from smoe.artifacts.program import OPS, Program
from smoe.artifacts.program_checks import problems

from .tables import pico

NEAR = [-1, 0, 1, 2, 3, 5, 7, 10, 16, 32, 40, 41, 64]
ABSURD = [2**31, 2**40, 2**62, 2**63, 10**30, -(2**31), -(2**63), 2**31 - 1, 2**26, 2**16]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e300, -1e39, 1e-300, 0.5, -0.0, 1e10]
OTHERS = [None, True, "", "x", [], {}, [1, 2], [[]], {"a": 1}, "logits", "position", 0.5, "\x1b[2J"]
HEALTHY, REFUSED = "healthy", "refused"

Table = dict[str, Any]


def damaged(text: str, random: Random) -> tuple[Table | str, str]:
    """A table of that text, damaged, and what was done; some as the text of one."""
    made, done = json.loads(text), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        damage = random.choice(DAMAGE)
        done.append(f"{damage.__name__} {damage(made, random)}")
        if damage is _other:  # what the others would trip over
            break
    if random.random() < 0.2:  # most are not, since that takes longer than to check them
        return _text(json.dumps(made), random), ", ".join([*done, "text"])
    return made, ", ".join(done)


def outcome(table: Table | str, manifest: Manifest, size: int) -> Program | None:
    """A program that passed every check, or None where the door said what is wrong."""
    try:
        if isinstance(table, str):
            program = Program.parse(table, "program.json")
        else:
            program = schema.parse(Program, table, "program.json")
        wrong = list(problems(program, manifest, size))
    except BundleError as error:
        wrong = [str(error)]
    assert len(wrong) <= 20 and all(len(said) < 4000 for said in wrong)
    assert all("again" in said for said in wrong)
    return None if wrong else program


def many(
    count: int, seed: int, run: Callable[[Program], None] | None = None
) -> tuple[dict[str, int], list[str]]:
    """Of so many damaged tables, how many are healthy and how many refused; and what those did that
    ended in another way. `run` runs the healthy ones."""
    program, data, manifest = pico()
    whole = program.to_json()
    counts, wrong, random = {HEALTHY: 0, REFUSED: 0}, [], Random(seed)
    for _ in range(count):
        text, done = damaged(whole, random)
        try:
            still = outcome(text, manifest, len(data))
            if still is not None and run is not None:
                run(still)
        except Exception as error:  # noqa: BLE001  anything else is what we look for
            wrong.append(f"{done}: {error!r}")
        else:
            counts[REFUSED if still is None else HEALTHY] += 1
    return counts, wrong


# -- damage ----------------------------------------------------------------------------------------


def _places(value: object, kinds: tuple[type, ...]) -> list[tuple[dict | list, object]]:
    """Where in a table values of these types are: what holds them, and their key there."""
    found: list = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    for key, item in pairs:
        if type(item) in kinds:
            found.append((value, key))
        if isinstance(item, dict | list):
            found += _places(item, kinds)
    return found


def _ops(table: Table, random: Random) -> list:
    return random.choice(table["parts"])["ops"]


def _view(table: Table, random: Random) -> dict:
    op = random.choice([op for op in _ops(table, random) if op["inputs"] or op["outputs"]])
    return random.choice(op["inputs"] + op["outputs"])


def _number(table: Table, random: Random) -> str:
    """A number is near to what it was, or far from it."""
    held, key = random.choice(_places(random.choice(_rooms(table)), (int, float)))
    kinds = [lambda: held[key] + random.choice([-64, -1, 1, 64]), lambda: random.choice(NEAR)]
    kinds += [lambda: random.choice(ABSURD), lambda: random.choice(FLOATS)]
    held[key] = random.choice(kinds)()
    return f"{key} = {held[key]}"


def _rooms(table: Table) -> list:
    """Parts of the table, so that the small ones are damaged as often as the large."""
    ops = [op for part in table["parts"] for op in part["ops"]]
    rooms = [table["buffers"], table["constants"], table["states"], *ops]
    return [room for room in rooms if _places(room, (int, float))]


def _other(table: Table, random: Random) -> str:
    """Something of another type."""
    held, key = random.choice(
        _places(random.choice(_rooms(table)), (int, float, str, dict, list, bool))
    )
    held[key] = random.choice(OTHERS)
    return f"{key} = {held[key]!r}"


def _name(table: Table, random: Random) -> str:
    """A name is another one of the table, which may have another kind, come later, or be kept."""
    held, key = random.choice(_places(random.choice(_rooms(table)), (str,)))
    other, there = random.choice(_places(random.choice(_rooms(table)), (str,)))
    held[key] = other[there]
    return f"{key} = {held[key]!r}"


def _kind(table: Table, random: Random) -> str:
    """An operation or what it does is another."""
    op = random.choice(_ops(table, random))
    other = random.choice(_ops(table, random))
    field = random.choice(["kind", "names", "numbers", "weight"])
    op[field] = random.choice([*OPS]) if field == "kind" else copy.deepcopy(other[field])
    return f"{field} = {op[field]!r}"


def _shape(table: Table, random: Random) -> str:
    """A view sees more, less, twice, turned round, or beyond its end."""
    view = _view(table, random)
    shape, strides = view["shape"], view["strides"]
    game = random.randrange(7)
    if game == 0:
        shape.append(random.choice(NEAR))
        strides.append(random.choice(NEAR))
    elif game == 1 and shape:
        shape.pop()
        strides.pop()
    elif game == 2:
        shape.reverse()
        strides.reverse()
    elif game == 3:
        view["shape"], view["strides"] = shape * 9, strides * 9
    elif game == 4 and strides:
        strides[random.randrange(len(strides))] = random.choice([0, 0, 1, 2, -1, 2**31])
    elif game == 5:
        view["offset"] += random.choice([-1, 1, 2, 8, 2**31])
    else:
        view["shape"], view["strides"] = [2**20] * 6, [0] * 6
    return f"view {view}"


def _operand(table: Table, random: Random) -> str:
    """A view takes another's place, dense ones share a buffer, an optional one is gone."""
    op = random.choice(_ops(table, random))
    side = random.choice(["inputs", "outputs"])
    game = random.randrange(4)
    if game == 0:
        op[side].append(copy.deepcopy(_view(table, random)))
    elif game == 1 and op[side]:
        op[side].pop(random.randrange(len(op[side])))
    elif game == 2 and op[side]:
        absent = {"source": "", "offset": 0, "shape": [], "strides": []}
        op[side][random.randrange(len(op[side]))] = absent
    elif op[side]:
        op[side][random.randrange(len(op[side]))] = copy.deepcopy(_view(table, random))
    return f"{op['kind']} {side}"


def _order(table: Table, random: Random) -> str:
    """Operations in another order, a second time, in another part, or not at all."""
    ops, others = _ops(table, random), _ops(table, random)
    game, place = random.randrange(4), random.randrange(len(ops))
    op = copy.deepcopy(ops[place]) if game == 0 else ops.pop(place)
    if game < 3:
        target = ops if game == 1 else others
        target.insert(random.randint(0, len(target)), op)
    if not ops:
        ops.append(op)
    return f"{op['kind']}, game {game}"


def _list(table: Table, random: Random) -> str:
    """A buffer, a constant, a state or a part more or less, or in another's place."""
    name = random.choice(["buffers", "constants", "states", "parts"])
    items = table[name]
    game, place = random.randrange(4), random.randrange(len(items))
    if game == 0:
        items.append(copy.deepcopy(items[place]))
    elif game == 1 and len(items) > 1:
        items.pop(place)
    elif game == 2:
        other = random.randrange(len(items))
        items[place], items[other] = items[other], items[place]
    elif name != "parts":
        field = random.choice([*items[place]])
        items[place][field] = copy.deepcopy(random.choice(items)[field])
    return f"{name}, game {game}"


def _unknown(table: Table, random: Random) -> str:
    """Half a part: operations and a reason, or neither."""
    part = random.choice(table["parts"])
    part["reason"] = random.choice(["a node", "", "\x1b[2J", "x" * 1000])
    return f"reason {part['reason'][:9]!r}"


def _text(text: str, random: Random) -> str:
    """Not the text of a table any more."""
    place = random.randrange(len(text))
    if random.random() < 0.3:  # as it was, spelled in another way
        return json.dumps(json.loads(text), indent=1)
    deep = random.choice(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e999", "NaN", '"\\ud800"'])
    return (
        text[:place] + random.choice(["", deep, chr(random.randrange(32, 127))]) + text[place + 1 :]
    )


DAMAGE = [
    _number, _number, _number, _other, _name, _name, _kind, _shape, _shape, _operand, _order,
    _order, _list, _unknown,
]  # fmt: skip
