"""Does the engine keep its memory promise? Peak memory against the budget, without a limit and
inside a cgroup."""

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
PROMPTS = (1, 130, 500, 1500)
NEW_TOKENS = 8
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "smoe.runtime")


@bench(
    options.BUNDLE,
    option("--context", type=int, default=1536),
    option("--loss", type=float, default=0.0, help="nats per token"),
    option("--prompts", type=int, nargs="+", default=PROMPTS, help="lengths in tokens"),
)
def memory(run: Run) -> Rows:
    """Peak memory against the budget, without any limit and inside a cgroup of that size.

    Six budgets and several prompts, each in a fresh process. First without any limit set, since a
    process that reclaims under pressure proves nothing: the peak of resident memory (anonymous and
    mapped) above what the imports hold, against the budget. Then, where memory cgroups can be had,
    with the budget and the imports as the limit and all files out of the page cache.
    """
    budgets = _budgets(run.bundle, run.context, run.loss)
    cases = [(budget, prompt) for budget in budgets for prompt in run.prompts]
    settings = {"bundle": run.bundle, "context": run.context, "loss": run.loss}
    results = []
    for budget, prompt in cases:
        note(f"budget {budget / MIB:.1f} MiB, prompt {prompt}")
        results.append(child("memory:peak_once", budget=budget, prompt=prompt, **settings))
    lines = [
        [
            budget / MIB,
            prompt,
            f["resident"],
            f["opened"] / MIB,
            f["peak"] / MIB,
            f["peak"] / budget,
        ]
        for (budget, prompt), f in zip(cases, results, strict=True)
    ]
    columns = {"budget MiB": "{:.1f}", "prompt": "{}", "experts": "{}", "opened": "{:.1f}",
               "peak": "{:.1f}", "peak / budget": "{:.3f}"}  # fmt: skip
    worst = max(line[-1] for line in lines)
    yield Table("peak", columns, lines, f"MiB above the imports; worst peak / budget {worst:.3f}")
    if reason := cgroup.unavailable():
        note(f"SKIPPED the part inside a memory cgroup: {reason}")
        return
    imports = max(f["import"] for f in results)
    yield _limited(cases, imports, settings)


def _limited(cases: list[tuple[int, int]], imports: int, settings: dict[str, Any]) -> Table:
    """The same cases inside cgroups, nothing in the page cache before."""
    lines: list[list[Any]] = []
    for budget, prompt in cases:
        libraries = page_cache.libraries(*LIBRARIES)
        left = page_cache.drop([*page_cache.files_under(settings["bundle"]), *libraries])
        arguments = settings | {"budget": budget, "prompt": prompt}
        with cgroup.Group("memory", budget + imports) as group:
            command = child_command("memory:peak_once", arguments)
            done = group.run(command, env=child_environment())
        result = "killed" if done.killed else "ran" if done.code == 0 else done.err.strip()[-200:]
        lines.append([budget / MIB, prompt, (budget + imports) / MIB, result, done.faults,
                      done.full, left / MIB])  # fmt: skip
    columns = {
        "budget MiB": "{:.1f}", "prompt": "{}", "limit": "{:.1f}", "result": "{}", "faults": "{}",
        "limit met": "{}", "left in cache": "{:.1f}",
    }  # fmt: skip
    ran = sum(line[3] == "ran" for line in lines)
    return Table("limited", columns, lines, f"Inside a cgroup: {ran} of {len(lines)} ran")


def _budgets(bundle: Path, context: int, loss: float) -> list[int]:
    """From the least that will do to all experts, or with a loss budget nearly all (there is
    nothing to spend it on with all of them), in six steps."""
    import numpy as np

    from bench.budgets import budget_for_count, planner
    from smoe.artifacts import open_bundle
    from smoe.runtime import Policies
    from smoe.runtime.options import tables_bytes

    opened = open_bundle(bundle)
    plan = planner(bundle, context, tables_bytes(Policies(loss=loss), opened))
    whole = plan(None)
    most = whole.experts - 1 if loss else whole.experts
    counts = [whole.smallest, *np.linspace(whole.token_cycle, most, 5).astype(int).tolist()]
    return [budget_for_count(plan, count) for count in counts]


def peak_once(bundle: str, budget: int, context: int, prompt: int, loss: float) -> dict[str, Any]:
    """Bytes: what the imports hold, and above that what is there once opened and at most."""
    import numpy as np
    import onnxruntime  # noqa: F401  counted as an import, wherever the runtime would load it

    from smoe.runtime import Engine, Policies
    from smoe.runtime.system import peak_memory, reset_peak_memory

    reset_peak_memory()
    before = peak_memory()
    with Engine.open(bundle, budget, context, policies=Policies(loss=loss)) as engine:
        opened = peak_memory() - before
        vocabulary = engine.bundle.manifest.model.vocabulary
        ids = np.random.default_rng(0).integers(0, vocabulary, prompt)
        for _ in engine.generate(ids, max_new_tokens=NEW_TOKENS):
            pass
        return {
            "import": before,
            "opened": opened,
            "peak": peak_memory() - before,
            "resident": engine.plan.capacity,
        }
