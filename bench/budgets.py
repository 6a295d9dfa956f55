"""The least memory in which so many experts stay, by the plan of the smoe that runs here.

What a budget leaves for experts is the plan's own business, so it is asked and not computed.
Commits that `sidebyside` compares have that plan in different places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smoe.artifacts import SmoeError, open_bundle


def planner(bundle: str | Path, context: int, tables: int = 0) -> Callable[[int | None], Any]:
    """A function from a budget in bytes (None: as much as it takes) to the plan of it."""
    try:
        from smoe.runtime.budget import plan_memory
    except ImportError:  # until 2026-11
        from smoe.runtime.memory import plan as plan_memory  # type: ignore[no-redef]
    opened = open_bundle(bundle)
    return lambda budget: plan_memory(opened, budget, context, tables=tables)


def beside(budget: int | None) -> dict[str, int | None]:
    """How `Engine.open` is told of a budget beside what the process holds already."""
    from smoe.runtime import Engine

    told = "beside" in inspect.signature(Engine.open).parameters
    return {"beside" if told else "memory": budget}  # until 2026-11 all budgets were such


def budget_for_share(bundle: str | Path, share: float, context: int) -> int:
    """Bytes of the engine for a share of all experts; tables that a policy reads come off them."""
    plan = planner(bundle, context)
    return budget_for_count(plan, int(plan(None).experts * share))


def budget_for_count(plan: Callable[[int | None], Any], count: int) -> int:
    """The least bytes in which `count` experts stay, by bisection: more memory never holds
    fewer."""
    low, high = 0, int(plan(None).total)
    while low < high:
        middle = (low + high) // 2
        try:
            enough = plan(middle).capacity >= count
        except SmoeError:  # too small to run at all
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    return high
