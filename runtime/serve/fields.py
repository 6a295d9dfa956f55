"""Fields of what clients send: each kind is read, refused by name, and described for OpenAPI.

A field that is null is one that was left out. What nobody knows is refused, so that nothing is
ignored in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from smoe.runtime.serve.refusal import Refusal

Json = dict[str, Any]
SHOWN = 60  # characters of a value in a refusal


class Kind(Protocol):
    """What a field may hold."""

    def read(self, name: str, value: Any) -> Any:
        """The value as it is used; a `Refusal` for what it cannot be."""
        ...

    def schema(self) -> Json:
        """The same as JSON schema."""
        ...


@dataclass(frozen=True)
class Number:
    """From `least` to `most`; whole where it is an `integer`."""

    least: float
    most: float
    integer: bool = False
    above: bool = False  # whether `least` itself is too little

    def read(self, name: str, value: Any) -> Any:
        kinds = (int,) if self.integer else (int, float)
        if self.integer and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise unfit(name, value, "a whole number" if self.integer else "a number")
        within = self.least < value if self.above else self.least <= value
        if not (within and value <= self.most):
            start = "above" if self.above else "from"
            raise unfit(name, value, f"{start} {self.least:g} to {self.most:g}")
        return value

    def schema(self) -> Json:
        kind = "integer" if self.integer else "number"
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": kind, least: self.least, "maximum": self.most}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise unfit(name, value, "true or false")
        return value

    def schema(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Words:
    """A text of up to `longest` characters."""

    longest: int

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise unfit(name, value, "a text")
        if len(value) > self.longest:
            raise Refusal(
                f"{name} has {len(value)} characters; up to {self.longest} are taken.", param=name
            )
        return utf8(name, value)

    def schema(self) -> Json:
        return {"type": "string", "maxLength": self.longest}


@dataclass(frozen=True)
class Listed:
    """From `least` to `most` of a kind; with `single` also one of them that is in no list."""

    kind: Kind
    most: int
    single: bool = False
    least: int = 0

    def read(self, name: str, value: Any) -> list[Any]:
        if self.single and not isinstance(value, list):
            value = [value]
        if not isinstance(value, list):
            raise unfit(name, value, "a list")
        if not self.least <= len(value) <= self.most:
            raise Refusal(
                f"{name} has {len(value)} items; {self.least} to {self.most} are taken.",
                param=name,
            )
        return [self.kind.read(f"{name}[{n}]", one) for n, one in enumerate(value)]

    def schema(self) -> Json:
        many: Json = {"type": "array", "items": self.kind.schema(), "maxItems": self.most}
        many |= {"minItems": self.least} if self.least else {}
        return {"oneOf": [self.kind.schema(), many]} if self.single else many


@dataclass(frozen=True)
class Object:
    """Any object, or one of these `fields` and no others."""

    fields: Mapping[str, Kind] | None = None
    required: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Json:
        if not isinstance(value, dict):
            raise unfit(name, value, "an object")
        if self.fields is None:
            each_text(name, value)
            return value
        return read_fields(self.fields, value, self.required, f"{name}.")

    def schema(self) -> Json:
        if self.fields is None:
            return {"type": "object"}
        return object_schema(self.fields, self.required)


@dataclass(frozen=True)
class Only:
    """What this server does anyway, under the names that clients have for it: other `values` it
    cannot do."""

    values: tuple[Any, ...]
    why: str = "this server cannot do that"

    def read(self, name: str, value: Any) -> Any:
        if not any(
            one == value and isinstance(one, bool) == isinstance(value, bool) for one in self.values
        ):
            allowed = " or ".join(json.dumps(one) for one in self.values)
            raise Refusal(
                f"{name} is {short(value)}, and {self.why}; leave it out, or give {allowed}.",
                param=name,
                code="unsupported_parameter",
            )
        return value

    def schema(self) -> Json:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class Anything:
    """What says who asks, or keeps books, and changes nothing of an answer."""

    def read(self, name: str, value: Any) -> None:
        return None

    def schema(self) -> Json:
        return {}


def read_fields(
    fields: Mapping[str, Kind], given: Json, required: tuple[str, ...] = (), prefix: str = ""
) -> Json:
    """What of `fields` is there and not null, read."""
    for name in required:
        if given.get(name) is None:
            raise Refusal(f"{prefix}{name} is missing.", param=f"{prefix}{name}")
    for name in given:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise Refusal(
                f"{prefix}{short(name)} is not supported here; these are: {known}.",
                param=f"{prefix}{_clean(name[:SHOWN])}",
                code="unsupported_parameter",
            )
    there = {name: value for name, value in given.items() if value is not None}
    return {name: fields[name].read(f"{prefix}{name}", value) for name, value in there.items()}


def object_schema(fields: Mapping[str, Kind], required: tuple[str, ...] = ()) -> Json:
    """JSON schema of an object of these fields, each of which may be null."""
    named = {
        name: kind.schema() if name in required else _or_null(kind.schema())
        for name, kind in fields.items()
    }
    made: Json = {"type": "object", "properties": named, "additionalProperties": False}
    return made | ({"required": list(required)} if required else {})


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def parse(body: bytes) -> Json:
    """The object that is in a body."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal(f"The body is not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise Refusal("The body is nested too deep; send a flat object.") from error
    except ValueError as error:
        raise Refusal(f"The body is not JSON: {str(error)[:SHOWN]}.") from error
    if not isinstance(given, dict):
        raise Refusal('The body is not a JSON object; send one, like {"prompt": "…"}.')
    return given


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def unfit(name: str, value: Any, wanted: str) -> Refusal:
    """The refusal of a value."""
    return Refusal(f"{name} is {short(value)}; {wanted} is wanted.", param=name)


def short(value: Any) -> str:
    """The beginning of a value, for a sentence."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = _clean(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _clean(text: str) -> str:
    """What UTF-8 cannot spell is a question mark."""
    return text.encode("utf-8", "replace").decode()


def utf8(name: str, text: str) -> str:
    """A text without half a pair of surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"{name} is not UTF-8 at character {error.start}.", param=name) from error
    return text


def each_text(name: str, value: Any) -> None:
    """`utf8` of every text in an object, keys too."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            utf8(name, one)
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
