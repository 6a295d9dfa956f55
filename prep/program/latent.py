"""Attention over latents: keys and values of every head are products with what is remembered of a
token, one vector for all heads, and keys have a part beside that is the same for all of them.

The products are moved to the other side, which is what makes them cheap: a query times a key is the
query times the key's matrix, times the latents; and a weighted sum of values is their matrix times
the weighted sum of latents. So all heads attend to one head of keys, the latents and the shared
part one behind the other, whose values are the latents themselves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from smoe.artifacts import tiles
from smoe.artifacts.program import ABSENT, KeyValues, View
from smoe.prep.backbone.compensate import nearest
from smoe.prep.program.attending import check_growing
from smoe.prep.program.origins import Origins, origins
from smoe.prep.program.values import Appended, Rows, Scores, Unknown
from smoe.prep.program.views import reshaped, sliced
from smoe.prep.program.weights import Coded, Matrix
from smoe.prep.program.writing import Writing

GROUP = 32  # columns of a turned matrix in few bits that share a scale


@dataclass(frozen=True)
class _Latents:
    """What keys and values of all heads are made of. Of the matrix `weight`, times the latents,
    rows `keys` `[heads, n]` give numbers `first` .. `first` + n of a head's keys, and rows
    `values` `[heads, e]` its values. Latents and the other numbers of keys, of the call's tokens,
    are `latents` and `shared`, which the states `names` remember."""

    weight: str
    keys: np.ndarray
    first: int
    values: np.ndarray
    latents: View
    shared: View
    names: tuple[str, str]


def attend(w: Writing, scores: Scores, values: Appended, q: View) -> View:
    """The attention of q `[heads, d]`, as `scores` says, over `values`: `[heads, e]`. `Unknown`
    where its keys and values are no such products."""
    made_of = _recognised(w, scores.keys, values, q.shape[0])
    (heads, n), (_, e) = made_of.keys.shape, made_of.values.shape
    size, rest = made_of.latents.shape[0], made_of.shared.shape[0]
    if q.shape[1] != n + rest:
        raise Unknown("its queries are not as wide as its keys")
    query, key = w.fresh((heads, size + rest)), w.fresh((1, size + rest))
    turned = _matrices(w, made_of.weight, made_of.keys, turned=True)
    own = sliced(q, 1, made_of.first, n)
    w.emit("head_product", (own,), (sliced(query, 1, 0, size),), turned)
    parts = (
        (sliced(q, 1, 0 if made_of.first else n, rest), sliced(query, 1, size, rest)),
        (_one_head(made_of.latents), sliced(key, 1, 0, size)),
        (_one_head(made_of.shared), sliced(key, 1, size, rest)),
    )
    for given, place in parts:
        w.emit("unary", (given,), (place,), names={"how": "copy"})
    mean = w.fresh((heads, size))
    state = _remembered(w, made_of.names, size, rest)
    inputs = (query, key, ABSENT, scores.sinks or ABSENT)
    w.emit("attention", inputs, (mean,), "", scores.numbers(), {"state": state.keys})
    made = w.fresh((heads, e))
    w.emit("head_product", (mean,), (made,), _matrices(w, made_of.weight, made_of.values))
    return made


def _one_head(view: View) -> View:
    head = reshaped(view, (1, *view.shape))
    assert head is not None  # an axis of one number
    return head


# -- the pattern -----------------------------------------------------------------------------------


def _recognised(w: Writing, keys: Appended, values: Appended, heads: int) -> _Latents:
    k, v = (_of_heads(w, each, heads) for each in (keys, values))
    source = v.sources.flat[0]
    ops = w.names.writers.get(source, [])
    if len(ops) != 1 or ops[0].kind != "product" or (v.sources != source).any():
        raise Unknown("attends to values that are no products with what is remembered")
    (product,) = ops
    if product.inputs[1] != ABSENT:
        raise Unknown("its keys and values have a bias")
    columns = k.sources[0] == source
    first, n = int(columns.argmax()), int(columns.sum())
    shared, rest = k.part(0, ~columns), len(columns) - n
    whole = n and rest and first in (0, rest) and columns[first : first + n].all()
    alike = all(k.part(head, ~columns).same(shared) for head in range(heads))
    if not whole or not alike or (k.sources[:, columns] != source).any():
        raise Unknown("attends to keys that are no products beside a part that all heads share")
    own = {name: _vector(rows) for name, rows in (keys.own | values.own).items()}
    names = tuple(
        next((name for name in own if origins(w.names, own[name]).same(each)), "")
        for each in (origins(w.names, product.inputs[0]), shared)
    )
    if set(names) != set(own) or len(own) != 2:
        raise Unknown("attends to something else than two states")
    row = product.outputs[0].offset
    return _Latents(
        product.weight,
        k.places[:, columns] - row,
        first,
        v.places - row,
        own[names[0]],
        own[names[1]],
        (names[0], names[1]),
    )


def _of_heads(w: Writing, value: Appended, heads: int) -> Origins:
    """Those of what is seen of a token, `[heads, d]`."""
    view = value.rows.view
    if view.shape[:-1] != (1, heads):
        raise Unknown(f"attends to {list(view.shape)} of a token, with {heads} heads")
    return origins(w.names, view).part(0)


def _vector(rows: Rows) -> View:
    view = reshaped(rows.view, (math.prod(rows.view.shape),))
    if view is None:
        raise Unknown("remembers numbers that lie apart")
    return view


def _remembered(w: Writing, names: tuple[str, str], size: int, rest: int) -> KeyValues:
    """The state of latents and of what is beside them."""
    for name, width in zip(names, (size, rest), strict=True):
        check_growing(w, name, 1, width)
    state = KeyValues(*names, w.index, 1, size + rest, size, latent=True)
    w.states.append(state)
    return state


# -- the matrices ----------------------------------------------------------------------------------


def _matrices(w: Writing, name: str, rows: np.ndarray, turned: bool = False) -> str:
    """The name of the matrices of all heads: of the matrix `name` the `rows` `[heads, n]`, or those
    turned, so that they are columns. Each begins on a tile.

    In few bits rows keep their codes. Columns cannot, since a scale is of a part of a row: they are
    rounded to 8 bits anew, which loses less than the products' own rounding of activations.
    """
    heads, n = rows.shape
    n_in = w.weights.shape(name)[1]
    count, width = (n_in, n) if turned else (n, n_in)
    apart = tiles.head_rows(count)

    def read() -> Matrix:
        matrix = w.weights.read(name)
        if not turned:
            return _rows(matrix, rows, apart)
        columns = _values(matrix)[rows].swapaxes(1, 2).reshape(heads * count, width)
        wide = _spread(columns, np.arange(heads * count).reshape(heads, count), apart)
        return _rounded(wide) if isinstance(matrix, Coded) else wide

    suffix = "keys" if turned else "values"
    return w.weights.matrix(f"{name}.{suffix}", (heads * apart, width), read)


def _rows(matrix: Matrix, rows: np.ndarray, apart: int) -> Matrix:
    """Rows `[heads, n]` of a matrix, those of each head followed by zeros up to `apart`."""
    if not isinstance(matrix, Coded):
        return _spread(matrix, rows, apart)
    codes = _spread(matrix.codes, rows, apart, 1 << (matrix.bits - 1))
    return dataclasses.replace(matrix, codes=codes, scales=_spread(matrix.scales, rows, apart))


def _spread(array: np.ndarray, rows: np.ndarray, apart: int, filling: int = 0) -> np.ndarray:
    heads, n = rows.shape
    wide = np.full((heads, apart, array.shape[1]), filling, array.dtype)
    wide[:, :n] = array[rows]
    return wide.reshape(heads * apart, -1)


def _values(matrix: Matrix) -> np.ndarray:
    """In float32."""
    if not isinstance(matrix, Coded):
        return matrix
    values = matrix.codes.astype(np.float32) - (1 << (matrix.bits - 1))
    return values * np.repeat(matrix.scales, matrix.group, axis=1)[:, : values.shape[1]]


def _rounded(matrix: np.ndarray) -> Coded:
    """In 8 bits."""
    coded = nearest(matrix, 8, GROUP)
    codes = coded.codes.reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return Coded(np.ascontiguousarray(codes), coded.scale, 8, GROUP)
