"""The filters, tests and methods of templates, each with what it costs.

They are Jinja's own, but for `tojson`, which takes the arguments that `transformers` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jinja2.runtime import Context, LoopContext, Macro, Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, pass_context

from smoe.runtime.templates import costs
from smoe.runtime.templates.costs import Cost
from smoe.runtime.templates.meter import CALL

if TYPE_CHECKING:
    from smoe.runtime.templates.meter import Meter

PLAIN = ImmutableSandboxedEnvironment()  # runs what is counted

SHALLOW = """attr batch count d default first items last length map random reject rejectattr safe
    select selectattr"""
LINEAR = """abs capitalize e escape filesizeformat float forceescape int lower reverse string title
    trim truncate upper urlencode wordcount"""
COMPARED = "dictsort groupby max min sort unique"
SQUARED = "pprint striptags urlize wordwrap xmlattr"
FILTER_COSTS: dict[str, Cost] = {
    **dict.fromkeys(SHALLOW.split(), costs.shallow),
    **dict.fromkeys(LINEAR.split(), costs.linear),
    **dict.fromkeys(COMPARED.split(), costs.compared),
    **dict.fromkeys(SQUARED.split(), costs.squared),
    "batch": costs.padded,
    "slice": costs.padded,
    "center": costs.padded,
    "format": costs.printed,
    "indent": costs.indented,
    "join": costs.joined,
    "list": costs.listed,
    "replace": costs.replaced,
    "round": costs.rounded,
    "sum": costs.summed,
}
AT_ONCE = {*COMPARED.split(), "join", "sum"}  # these hold all that an iterator gives

DEEP_TESTS = {"!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in"}
DEEP_TESTS |= {"le", "lessthan", "lt", "ne", "lower", "upper"}

LINEAR_METHODS = """capitalize casefold count encode endswith find index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper lower
    lstrip maketrans partition removeprefix removesuffix rstrip startswith strip swapcase title
    upper"""
METHOD_COSTS: dict[str, Cost] = {
    **dict.fromkeys(LINEAR_METHODS.split(), costs.linear),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), costs.padded),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), costs.searched_backwards),
    **dict.fromkeys(("split", "splitlines"), costs.split),
    **dict.fromkeys(("format", "format_map"), costs.formatted),
    "expandtabs": costs.tabulated,
    "join": costs.joined_by,
    "replace": costs.replaced,
    "translate": costs.translated,
}


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it: no character is escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


PLAIN.filters["tojson"] = to_json


def charge(meter: Meter, callee: Any, arguments: tuple[Any, ...], named: list[Any]) -> None:
    """Count the call of a function; a macro counts for itself."""
    builtin = getattr(callee, "__wrapped__", callee)  # str.format, which the sandbox wraps
    owner = getattr(builtin, "__self__", None)
    name = getattr(builtin, "__name__", "")
    if isinstance(callee, (Macro, LoopContext, Undefined)):
        meter.spend(CALL)
    elif isinstance(owner, str) and name in METHOD_COSTS:
        METHOD_COSTS[name](meter, owner, *arguments, *named)
    elif isinstance(owner, dict) and name in ("get", "items", "keys", "values"):
        meter.read(*arguments)
    elif isinstance(owner, (list, tuple, dict)) and name in ("index", "count", "copy"):
        meter.read(owner, *arguments)
    elif isinstance(owner, (LoopContext, Cycler, Joiner)):
        meter.read(*arguments)
    else:
        costs.squared(meter, owner, *arguments, *named)


def meter_of(context: Context) -> Meter:
    """What counts for the environment of a context."""
    return context.environment.meter  # type: ignore[attr-defined]


def _filter(name: str) -> Callable[..., Any]:
    """A filter that is counted."""

    @pass_context
    def run(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        meter = meter_of(context)
        meter.spend(CALL)
        if name in AT_ONCE and isinstance(value, Iterator):
            value = list(value)
        if name == "tojson":
            costs.as_json(meter, value, *_layout(arguments, named))
        else:
            FILTER_COSTS[name](meter, value, *arguments, *named.values())
        made = PLAIN.call_filter(name, value, arguments, named, context, context.eval_ctx)
        return meter.made(made)

    return run


def _layout(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Indentation and separators among the arguments of `to_json`."""
    placed = dict(zip(("ensure_ascii", "indent", "separators"), arguments, strict=False)) | named
    return placed.get("indent"), placed.get("separators")


def _test(name: str) -> Callable[..., Any]:
    """A test that is counted."""
    deep = name in DEEP_TESTS

    @pass_context
    def run(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        meter = meter_of(context)
        meter.spend(CALL)
        meter.read(*arguments, *named.values(), *([value] if deep else []))
        return PLAIN.call_test(name, value, arguments, named, context, context.eval_ctx)

    return run


# What a template's own nodes are wrapped in, under names that no template can write.


@pass_context
def _step(context: Context, nodes: int) -> bool:
    meter_of(context).spend(nodes)
    return True


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    costs.joined(meter_of(context), parts)
    join = markup_join if context.eval_ctx.autoescape else str_join
    return meter_of(context).made(join(parts))


@pass_context
def _read(context: Context, value: Any) -> Any:
    meter_of(context).read(value)
    return value


@pass_context
def _searched(context: Context, values: Any) -> Any:
    meter = meter_of(context)
    if isinstance(values, Iterator):
        return (value for value in values if meter.read(value) or True)
    if not isinstance(values, (dict, range)):
        meter.read(values)
    return values


@pass_context
def _made(context: Context, value: Any) -> Any:
    return meter_of(context).made(value)


@pass_context
def _printed(context: Context, value: Any) -> Any:
    meter = meter_of(context)
    if not isinstance(value, str):
        meter.afford(costs.WRITTEN * meter.read(value))
    return value


STEP, JOIN, READ, SEARCH, MADE, PRINT = (
    f"smoe:{name}" for name in ("step", "join", "read", "search", "made", "print")
)
OWN = {
    STEP: _step, JOIN: _joined, READ: _read, SEARCH: _searched, MADE: _made, PRINT: _printed,
}  # fmt: skip
FILTERS = {name: _filter(name) for name in PLAIN.filters} | OWN
TESTS = {name: _test(name) for name in PLAIN.tests}
