"""What an engine may take here: the budget that was stated, or what the machine and its container
leave, beside what this process holds already. `budget` divides it."""

from __future__ import annotations

import importlib

from smoe.artifacts.bundle import Bundle
from smoe.runtime import machine
from smoe.runtime.budget import (
    ONE,
    ONNX_PROCESS,
    PROCESS,
    RESERVE,
    SWING,
    MemoryPlan,
    Requests,
    Source,
    default_budget,
    plan_memory,
)
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import AUTO, CODE, ONNX_CODE, Execution
from smoe.runtime.sizes import MIB, parse_size, show_size
from smoe.runtime.system import trim_heap

KERNEL = MIB  # what the kernel keeps for a process, beside the tables of its pages
PAGED = 512  # bytes that a byte of these tables is for

_left = 0  # bytes that the engines that are closed left in this process, for the next one to use


def allow(
    bundle: Bundle,
    memory: str | int | None = None,
    beside: str | int | None = None,
    context: int | None = None,
    level: int | None = None,
    tables: int = 0,
    execution: Execution = AUTO,
    requests: Requests = ONE,
) -> MemoryPlan:
    """The plan of an engine in a process that holds no more than `memory`, or no more than `beside`
    above what it holds now, or, if neither is stated, than what is left to it here. The rest as in
    `plan_memory`. An `EngineError` says the minimum where that is too little."""
    if memory is not None and beside is not None:
        raise EngineError(
            "A budget is stated for the whole process (memory) or beside what it holds (beside), "
            "not both."
        )

    def plan(budget: int | None, source: Source | None, held: int) -> MemoryPlan:
        return plan_memory(
            bundle, budget, context, level, tables, held, source, execution, requests
        )

    alone = plan(None, None, 0)

    if beside is not None:
        stated = parse_size(beside)
        held = process(alone, stated)
        return plan(held + stated, _beside(stated, held), held)
    if memory is not None:
        budget = parse_size(memory)
        return plan(budget, _stated(budget), process(alone, budget))
    room = machine.memory_room()
    whole = plan(None, _unlimited(room), process(alone))
    allowed = None if room is None else default_budget(whole.total, room.nbytes)
    if room is None or allowed is None:
        return whole
    return plan(allowed, _default(room, whole.minimum), process(alone, allowed))


def process(alone: MemoryPlan, budget: int | None = None) -> int:
    """Bytes that this process takes without an engine: what it holds, with ONNX Runtime where the
    engine needs that, and what the kernel keeps for it with an engine that takes `budget`, or
    what `alone`, a plan of nothing else, takes of that. What closed engines left here, as far as
    this one uses it, is counted there."""
    code = CODE
    if alone.onnxruntime:
        importlib.import_module("onnxruntime")
        code += ONNX_CODE
    held = (machine.held_memory() or 0) - min(_left, code + alone.workspace)
    return _with_kernel(max(0, held), alone.total if budget is None else min(budget, alone.total))


def usual_process(engine: int, onnxruntime: bool = True) -> int:
    """The same of a `smoe run` on another machine, with an engine of so many bytes that needs ONNX
    Runtime or not."""
    return _with_kernel(PROCESS + (ONNX_PROCESS if onnxruntime else 0), engine)


def longest_context(
    bundle: Bundle, plan: MemoryPlan, level: int | None = None, execution: Execution = AUTO
) -> int:
    """The longest context that the budget of `plan`, or where none was stated what is left to this
    process, has room for beside the few experts that a bundle cannot do without; `plan`'s at
    least."""
    room = machine.memory_room()
    budget = plan.budget or (None if room is None else room.nbytes - room.nbytes // RESERVE)
    low, high = plan.context, bundle.manifest.model.context
    while low < high:
        middle = (low + high + 1) // 2
        longer = plan_memory(bundle, None, middle, level, 0, plan.process, None, execution)
        fits = budget is None or longer.minimum <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def leave(plan: MemoryPlan) -> None:
    """An engine of this plan is closed: what is here beyond what was there before comes of it."""
    global _left
    trim_heap()
    if plan.process:
        kernel = _with_kernel(plan.process, plan.total - plan.process) - plan.process
        _left = max(0, (machine.held_memory() or 0) - (plan.process - kernel))


def _with_kernel(held: int, engine: int) -> int:
    return held + KERNEL + (held + engine) // PAGED


def _stated(budget: int) -> Source:
    room, size = machine.memory_room(), show_size(budget)
    of = f"of {size} stated"
    if room is not None and room.nbytes < budget - budget // SWING:
        of += f", though {room.keeper} leaves {show_size(room.nbytes)}"
    return Source(f"{of}{_unknown()}", f"A budget of {size}")


def _beside(stated: int, held: int) -> Source:
    return Source(
        f"of {show_size(stated + held)}, {show_size(stated)} stated beside the process{_unknown()}",
        f"A budget of {show_size(stated)} beside what this process holds",
        beside=True,
    )


def _default(room: machine.Room, minimum: int) -> Source:
    """Where a plan needs `minimum` bytes."""
    left, reserve = show_size(room.nbytes), show_size(room.nbytes // RESERVE)
    all_of_it = f"; --memory {left} takes the reserve, too" if minimum <= room.nbytes else ""
    return Source(
        f"of {left} that {room.keeper} leaves, {reserve} in reserve{_unknown()}",
        f"What {room.keeper} leaves, {left} less a reserve of {reserve},",
        f"Give it more, or take a shorter context{all_of_it}.",
    )


def _unlimited(room: machine.Room | None) -> Source:
    if room is None:
        of = "without a budget, since this system does not say what it leaves"
    else:
        of = f"of {show_size(room.nbytes)} that {room.keeper} leaves"
    return Source(f"{of}{_unknown()}", "No budget")


def _unknown() -> str:
    if machine.held_memory() is not None:
        return ""
    return " (beside interpreter and libraries, of which this system does not say what they hold)"
