"""What a replay is asked for: policies beside the bound, and budgets."""

from __future__ import annotations

from collections.abc import Sequence

from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import Trace
from smoe.prep.replay.simulate import BOUND, REPLAYED, least_for_shares
from smoe.runtime.sizes import parse_size

SWEEP = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)  # of all experts, where nothing is asked for


def with_bound(trace: Trace, policies: Sequence[str], budgets: Sequence[int]) -> list[str]:
    """What to replay: the bound, then what was asked for, or all that this trace and `budgets`
    allow if nothing was."""
    able = [n for n, kind in REPLAYED.items() if trace.scored or not kind.needs_scores]
    if min(*budgets, trace.total) >= least_for_shares(trace):
        able += ["layer-lru", "layer-lfu"]
    return [BOUND, *(policy for policy in policies or able if policy != BOUND)]


def budgets_of(trace: Trace, memory: Sequence[str], residency: Sequence[float]) -> list[int]:
    """Bytes for resident experts (records, where their sizes are not known) of what was asked for:
    sizes, or parts of all experts; if neither was, what of `SWEEP` holds a record for each
    layer."""
    if memory and residency:
        raise PrepError("Budgets are given either as memory or as residency, not as both.")
    wrong = [part for part in residency if not 0 < part <= 1]
    if wrong:
        raise PrepError(
            f"A residency of {wrong[0]} was asked for; it is a part of all experts, above 0 and up "
            f"to 1."
        )
    if memory and not trace.sized and not all(text.strip().isdigit() for text in memory):
        raise PrepError(
            f"{trace.name} does not say how large records are; give --memory as a number of "
            f"records."
        )
    asked = [parse_size(text) if trace.sized else int(text) for text in memory] or [
        int(part * trace.total) for part in residency or SWEEP
    ]
    if not memory and not residency:
        asked = [budget for budget in asked if budget >= least_for_shares(trace)] or [trace.total]
    least = max(trace.records)
    for budget in asked:
        if budget < least:
            raise PrepError(
                f"A budget of {trace.show(budget)} holds no record of {trace.show(least)}; give "
                f"more."
            )
    return asked
