"""Does the engine keep its memory promise?  python bench/memory.py BUNDLE [--context N] [--loss NATS]

For six budgets and prompts of 1 to 1500 tokens a fresh process imports what the runtime imports, then opens the bundle, reads
the prompt and generates. First without any limit set, since a process that reclaims under pressure proves nothing: the
peak of resident memory (anonymous and mapped) above the import, against the budget. Then, where memory cgroups can be
had, inside one of the budget and the import's size, with all files out of the page cache before: killed or not, how often a page fault
waited for a disk, and how often the kernel had to take pages back.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import cgroup
import numpy as np

from smoe.artifacts import open_bundle
from smoe.runtime import Policies
from smoe.runtime.budget import plan_memory
from smoe.runtime.options import tables_bytes

MIB = 1 << 20
PROMPTS = (1, 130, 500, 1500)
CHILD = """
import json, sys
import numpy as np, onnxruntime
from smoe.runtime import Engine, Policies
from smoe.runtime.system import peak_memory, reset_peak_memory
bundle, (memory, context, tokens), loss = sys.argv[1], map(int, sys.argv[2:5]), float(sys.argv[5])
reset_peak_memory()
before = peak_memory()
with Engine.open(bundle, memory=memory, context=context, policies=Policies(loss=loss)) as engine:
    opened = peak_memory() - before
    ids = np.random.default_rng(0).integers(0, engine.manifest.model.vocabulary, tokens)
    for _ in engine.generate(ids, max_new_tokens=8): pass
    print(json.dumps({"import": before, "opened": opened, "peak": peak_memory() - before, "planned": engine.plan.total,
                      "resident": engine.plan.capacity, "reads": engine.reading.io}))
"""


def command(bundle: Path, budget: int, context: int, tokens: int, loss: float) -> list[str]:
    return [sys.executable, "-c", CHILD, str(bundle), *map(str, (budget, context, tokens, loss))]


def budgets(bundle: Path, context: int, loss: float) -> list[int]:
    """From the least that will do to all experts, or with a loss budget nearly all, in six steps."""
    manifest = open_bundle(bundle).manifest
    plan = plan_memory(manifest, None, context, tables=tables_bytes(Policies(loss=loss), manifest))
    most = (
        plan.experts - 1 if loss else plan.experts
    )  # with all of them there is nothing to spend it on
    counts = [plan.smallest, *np.linspace(plan.token_cycle, most, 5).astype(int).tolist()]
    return [plan.fixed + count * plan.record for count in counts]


def unlimited(bundle: Path, context: int, loss: float) -> list[dict]:
    found = []
    print(
        f"{'budget':>8} {'prompt':>7} {'experts':>8} {'opened':>8} {'peak':>8}  peak/budget  (MiB, above the import)"
    )
    for budget in budgets(bundle, context, loss):
        for tokens in PROMPTS:
            done = subprocess.run(
                command(bundle, budget, context, tokens, loss),
                capture_output=True,
                text=True,
                check=True,
            )
            got = json.loads(done.stdout) | {"budget": budget, "prompt": tokens}
            found.append(got)
            print(f"{budget / MIB:8.1f} {tokens:7} {got['resident']:8} {got['opened'] / MIB:8.1f} "
                  f"{got['peak'] / MIB:8.1f} {got['peak'] / budget:12.3f}", flush=True)  # fmt: skip
    return found


def limited(bundle: Path, context: int, imported: int, loss: float) -> list[dict]:
    found = []
    print(
        f"\n{'budget':>8} {'prompt':>7} {'limit':>8} {'killed':>7} {'faults':>7} {'full':>7} {'left in cache':>14}"
    )
    for budget in budgets(bundle, context, loss):
        for tokens in PROMPTS:
            libraries = cgroup.libraries("numpy", "onnxruntime", "tokenizers", "smoe.runtime")
            left = cgroup.drop([*cgroup.files_of(bundle), *libraries])
            with cgroup.Group("memory", budget + imported) as group:
                done = group.run(command(bundle, budget, context, tokens, loss))
            got = {"budget": budget, "prompt": tokens, "limit": budget + imported, "left": left, "ok": done.code == 0,
                   "killed": done.killed, "major_faults": done.faults, "full": done.full}  # fmt: skip
            found.append(got)
            print(f"{budget / MIB:8.1f} {tokens:7} {got['limit'] / MIB:8.1f} {'yes' if done.killed else 'no':>7} "
                  f"{done.faults:7} {done.full:7} {left / MIB:14.1f}" + ("" if got["ok"] else f"  {done.err[-200:]}"),
                  flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--loss", type=float, default=0.0)
    asked = parser.parse_args()
    runs = unlimited(asked.bundle, asked.context, asked.loss)
    worst = max(run["peak"] / run["budget"] for run in runs)
    print(f"worst peak/budget: {worst:.3f}")
    if reason := cgroup.unavailable():
        print(f"SKIPPED the part inside a memory cgroup: {reason}")
    else:
        limits = limited(
            asked.bundle, asked.context, max(run["import"] for run in runs), asked.loss
        )
        print(f"{len(limits)} runs inside a cgroup, {sum(not run['ok'] for run in limits)} failed")
