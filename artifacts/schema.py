"""Frozen dataclasses as the schema of JSON: exactly these fields with exactly these types, and a
sentence that names the field for anything else."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable

from smoe.artifacts.errors import BundleError

T = typing.TypeVar("T")
LONGEST, SHOWN = 60, 10  # characters of a name or value in an error, names of one

Parser = Callable[[typing.Any], typing.Any]


def load(text: str, where: str) -> typing.Any:
    """JSON of untrusted text; `where` names the file in errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON ({error}); copy the bundle again.") from error


def parse(schema: type[T], value: typing.Any, where: str) -> T:
    """`value`, as JSON has it, as an instance of the dataclass `schema`; nothing is converted but
    int to float. Older versions lack the fields whose metadata say `since`."""
    try:
        result = _parser(typing.cast(typing.Any, schema))(value)
    except _Wrong as wrong:
        path = "".join(reversed(wrong.path))
        raise BundleError(f"{where}{path}{wrong.said}; build the bundle again.") from None
    return typing.cast(T, result)


class _Wrong(Exception):
    """What is wrong, and the way to it, innermost first."""

    def __init__(self, said: str):
        super().__init__(said)
        self.said, self.path = said, list[str]()


@functools.cache
def _parser(hint: typing.Any) -> Parser:
    """What makes an instance of the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = _parser(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _object_parser(hint)
    if origin is tuple:
        return _list_parser(args[0])
    if origin is dict:
        return _dict_parser(_parser(args[1]))
    return _plain_parser(hint)


def _object_parser(schema: type) -> Parser:
    hints = typing.get_type_hints(schema)
    later = {field.name for field in dataclasses.fields(schema) if "since" in field.metadata}
    parsers = {name: _parser(hint) for name, hint in hints.items()}

    def parse_object(value: typing.Any) -> typing.Any:
        if not isinstance(value, dict):
            raise _unlike("an object", value)
        if value.keys() != parsers.keys():
            odd = sorted((value.keys() ^ parsers.keys()) - (later - value.keys()))
            if odd:
                names = ", ".join(name[:LONGEST] for name in odd[:SHOWN])
                raise _Wrong(f": the fields {names} are missing or unknown")
        return schema(**_parsed(value, parsers))

    return parse_object


def _parsed(value: dict[str, typing.Any], parsers: dict[str, Parser]) -> dict[str, typing.Any]:
    made = {}
    for key, item in value.items():
        try:
            made[key] = parsers[key](item)
        except _Wrong as wrong:
            wrong.path.append(f": {key[:LONGEST]}")
            raise
    return made


def _list_parser(hint: typing.Any) -> Parser:
    parser, plain = _parser(hint), {hint} & {int, str}

    def parse_list(value: typing.Any) -> typing.Any:
        if not isinstance(value, list):
            raise _unlike("a list", value)
        if plain and {*map(type, value)} <= plain:  # most lists of a large table
            return tuple(value)
        made = []
        for item in value:
            try:
                made.append(parser(item))
            except _Wrong as wrong:
                wrong.path.append(f"[{len(made)}]")
                raise
        return tuple(made)

    return parse_list


def _dict_parser(parser: Parser) -> Parser:
    def parse_dict(value: typing.Any) -> typing.Any:
        if not isinstance(value, dict):
            raise _unlike("an object", value)
        return _parsed(value, dict.fromkeys(value, parser))

    return parse_dict


def _plain_parser(kind: type) -> Parser:
    def parse_plain(value: typing.Any) -> typing.Any:
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        if type(value) is not kind:
            raise _unlike(kind.__name__, value)
        return value

    return parse_plain


def _unlike(expected: str, value: object) -> _Wrong:
    shown = "a list" if isinstance(value, list) else "an object"
    if not isinstance(value, list | dict):
        shown = repr(str(value)[:LONGEST])
    return _Wrong(f": {expected} was wanted, found {shown}")
