"""Jinja for templates that nobody vouches for: the sandbox of Jinja keeps them from Python's
objects, and a `Meter` counts what they do.

Before a template is compiled, nodes that work without asking the environment are wrapped in
filters of ours: what loops, joins, slices, compares, builds or prints. Filters, tests, calls and
operators ask by themselves. So nothing runs whose cost was not counted or bounded first.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from datetime import datetime
from types import CodeType
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from smoe.runtime.templates import costs, filters
from smoe.runtime.templates.meter import CALL, ITEM, Meter, TooMuch

LONGEST = 2**16  # characters of a template; the longest in use have some 30,000
DATE = 256  # characters at most that a format of dates makes of one


class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering, as `transformers` sets Jinja up."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, meter: Meter):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # that would run filters while it compiles
        )
        self.meter = meter
        self.filters.update(filters.FILTERS)
        self.tests.update(filters.TESTS)
        self.globals.update(
            dict=TemplateDict(),
            namespace=TemplateNamespace,
            raise_exception=_raise,
            strftime_now=self._now,
        )
        self.concat = self._concat  # type: ignore[method-assign]
        self._ours = (self.globals["range"], TemplateNamespace, _raise, self.globals["cycler"])

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text of a template. Errors are those of Jinja and Python, and `TooMuch`."""
        code = compiled(template)
        made = self.template_class.from_code(self, code, self.make_globals(None))
        return self._concat(made.generate(**variables))

    def _concat(self, pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            self.meter.spend(len(piece) + 1)
            kept.append(piece)
        return "".join(kept)

    def _now(self, form: str) -> str:
        self.meter.afford(DATE * len(form))
        return datetime.now().strftime(form)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        costs.operated(self.meter, operator, left, right)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # it is hashed, and Python's stack with it
            self.meter.read(argument)
        return super().getitem(obj, argument)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.spend(CALL)
        if isinstance(getattr(callee, "__self__", None), str):  # of str.join
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
        if isinstance(callee, TemplateDict):
            self.meter.read(*args, *kwargs.values())
        elif not any(callee is ours for ours in self._ours):
            named = [value for name, value in kwargs.items() if not name.startswith("_")]
            filters.charge(self.meter, callee, args, named)
        return self.meter.made(super().call(context, callee, *args, **kwargs))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class TemplateDict:
    """`dict`, and no way from it to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """A namespace without private names, which prints nothing of what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` can be a name in it
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot hold {name!r}, which begins with an underscore"
        )


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training. Here it is a scope."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return caller()


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> CodeType:
    """Python's code of a template that counts its work."""
    if len(template) > LONGEST:
        raise TooMuch(f"it has {len(template)} characters, and {LONGEST} are the most")
    environment = Sandbox(Meter(len(template)))
    tree = Metered().visit(environment.parse(template))
    with warnings.catch_warnings():  # of Python's compiler, which would print the template's lines
        warnings.simplefilter("ignore", SyntaxWarning)
        return environment.compile(tree.set_environment(environment))


class Metered(NodeTransformer):
    """A template whose nodes count what they do."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Every iteration counts the nodes of its body, and of its condition."""
        test = node.test
        self._body(node)
        if test is not None and node.test is not None:
            node.test = nodes.And(_step([test]), node.test)
        return node

    def _body(self, node: Any) -> nodes.Node:
        count = nodes.ExprStmt(_step(node.body))
        self.generic_visit(node)
        node.body.insert(0, count)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_wrapped(filters.PRINT, part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(filters.JOIN, nodes.List(node.nodes))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _wrapped(filters.READ, node.expr)
        for operand in node.ops:
            name = filters.SEARCH if operand.op in ("in", "notin") else filters.READ
            operand.expr = _wrapped(name, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(filters.MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def _display(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        target = getattr(node, "ctx", "load") != "load"
        return node if target else _wrapped(filters.MADE, node)

    visit_List = visit_Tuple = visit_Dict = _display

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _wrapped(filters.READ, node.key)
        return node


def _wrapped(name: str, value: nodes.Expr) -> nodes.Expr:
    if isinstance(value, (nodes.Const, nodes.TemplateData)):
        return value
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _step(body: Iterable[nodes.Node]) -> nodes.Expr:
    number = nodes.Const(ITEM + sum(_size(node) for node in body))
    return nodes.Filter(number, filters.STEP, [], [], None, None)


def _size(node: nodes.Node) -> int:
    """Nodes in a node, without the bodies that count for themselves."""
    own = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
    children = node.iter_child_nodes(exclude=("body",) if own else None)
    return 1 + sum(_size(child) for child in children)
