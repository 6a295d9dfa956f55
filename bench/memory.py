"""Does a process keep to the memory that was stated? Its peak against it, without a limit and
inside a cgroup of just that size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import cgroup, options, page_cache
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    child_command,
    child_environment,
    note,
    option,
)

MIB = 1 << 20
PROMPTS = (1, 130, 500)
NEW_TOKENS = 8
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "smoe.runtime")


@bench(
    options.BUNDLE,
    option("--context", type=int, default=1536),
    option("--loss", type=float, default=0.0, help="nats per token"),
    option(
        "--prompts", type=int, nargs="+", default=PROMPTS,
        help="lengths in tokens, beside one that fills the context",
    ),
)  # fmt: skip
def memory(run: Run) -> Rows:
    """Peak memory of the whole process against what was stated, and cgroups of that size.

    Budgets from the stated minimum (and 1.1 and 2 times that) to all experts, and several prompts,
    of which the longest fills the context; each in a fresh process. First without any limit set,
    since a process that reclaims under pressure proves nothing: its peak of resident memory,
    anonymous and mapped, interpreter and libraries included. Then, where memory cgroups can be had,
    with the budget as the limit and all files out of the page cache.
    """
    settings = {"bundle": run.bundle, "context": run.context, "loss": run.loss}
    budgets = child("memory:budgets", **settings)
    prompts = [*run.prompts, run.context - NEW_TOKENS]
    cases = [(budget, prompt) for budget in budgets for prompt in prompts]
    lines = []
    for budget, prompt in cases:
        note(f"budget {budget / MIB:.1f} MiB, prompt {prompt}")
        done = child("memory:peak_once", budget=budget, prompt=prompt, **settings)
        sizes = [done[name] / MIB for name in ("process", "opened", "peak")]
        lines.append([budget / MIB, prompt, done["resident"], *sizes, done["peak"] / budget])
    columns = {"budget MiB": "{:.1f}", "prompt": "{}", "experts": "{}", "process": "{:.1f}",
               "opened": "{:.1f}", "peak": "{:.1f}", "peak / budget": "{:.3f}"}  # fmt: skip
    worst = max(line[-1] for line in lines)
    yield Table(
        "peak", columns, lines, f"MiB of the whole process; worst {worst:.3f} of the budget"
    )
    if reason := cgroup.unavailable():
        note(f"SKIPPED the part inside a memory cgroup: {reason}")
        return
    yield _limited(cases, settings)


def _limited(cases: list[tuple[int, int]], settings: dict[str, Any]) -> Table:
    """The same cases inside cgroups of just the budget, nothing in the page cache before."""
    lines: list[list[Any]] = []
    for budget, prompt in cases:
        libraries = page_cache.libraries(*LIBRARIES)
        left = page_cache.drop([*page_cache.files_under(settings["bundle"]), *libraries])
        arguments = settings | {"budget": budget, "prompt": prompt}
        with cgroup.Group("memory", budget) as group:
            command = child_command("memory:peak_once", arguments)
            done = group.run(command, env=child_environment())
        result = "killed" if done.killed else "ran" if done.code == 0 else done.err.strip()[-200:]
        lines.append([budget / MIB, prompt, result, done.peak / MIB, done.faults, done.full,
                      left / MIB])  # fmt: skip
    columns = {
        "limit MiB": "{:.1f}", "prompt": "{}", "result": "{}", "counted": "{:.1f}", "faults": "{}",
        "limit met": "{}", "left in cache": "{:.1f}",
    }  # fmt: skip
    ran = sum(line[2] == "ran" for line in lines)
    return Table("limited", columns, lines, f"Inside a cgroup: {ran} of {len(lines)} ran")


def budgets(bundle: str, context: int, loss: float) -> list[int]:
    """The minimum that is stated, 1.1 and 2 times that, and what keeps one token's, half and all of
    the experts, or with a loss budget nearly all (there is nothing to spend it on with all of
    them). In a process like the one that is measured: its own memory is part of them."""
    from smoe.artifacts import open_bundle
    from smoe.runtime import Policies, allowance
    from smoe.runtime.budget import memory_for, plan_memory
    from smoe.runtime.options import tables_bytes

    opened = open_bundle(Path(bundle))
    tables = tables_bytes(Policies(loss=loss), opened)
    alone = plan_memory(opened, None, context, tables=tables)
    process = allowance.process(alone)
    whole = plan_memory(opened, None, context, tables=tables, process=process)
    most = whole.experts - 1 if loss else whole.experts
    counts = (whole.token_cycle, most // 2, most)
    kept = [memory_for(opened, count, context, tables=tables, process=process) for count in counts]
    least = whole.minimum
    return sorted({least, *(b for b in (11 * least // 10, 2 * least) if b < kept[-1]), *kept})


def peak_once(bundle: str, budget: int, context: int, prompt: int, loss: float) -> dict[str, Any]:
    """Bytes of the whole process: what the plan says that it holds without an engine, once that is
    open, and at most, after a prompt and some tokens more."""
    import numpy as np

    from smoe.runtime import Engine, Policies
    from smoe.runtime.system import peak_memory, reset_peak_memory

    reset_peak_memory()
    policies = Policies(loss=loss)
    with Engine.open(bundle, memory=budget, context=context, policies=policies) as engine:
        opened = peak_memory()
        vocabulary = engine.bundle.manifest.model.vocabulary
        ids = np.random.default_rng(0).integers(0, vocabulary, prompt + NEW_TOKENS)
        for _ in engine.score(ids, prompt=prompt):
            pass
        return {
            "process": engine.plan.process,
            "opened": opened,
            "peak": peak_memory(),
            "resident": engine.plan.capacity,
        }
