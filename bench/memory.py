"""Does the engine keep its memory promise?  python bench/memory.py BUNDLE

For each budget and prompt length a fresh process imports what the runtime imports, then opens the bundle and runs;
printed is the peak of resident memory (anonymous and mapped) above the import, against the budget. No limit is set:
a process that reclaims under pressure proves nothing.
"""

import json
import subprocess
import sys

CHILD = """
import json, re, sys
import numpy as np, onnxruntime
from smoe.runtime import Engine
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
bundle, memory, context, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Engine.open(bundle, memory=None if memory == "none" else int(memory), context=context) as engine:
    opened = status("VmHWM") - before
    ids = np.random.default_rng(0).integers(0, engine.manifest.model.vocabulary, tokens)
    for _ in engine.generate(ids, max_new_tokens=8): pass
    plan = engine.plan
print(json.dumps({"peak": status("VmHWM") - before, "opened": opened, "plan": plan.total,
                  "backbone": plan.backbone, "state": plan.state, "workspace": plan.workspace,
                  "resident": plan.capacity}))
"""


def measure(bundle: str, memory: str, context: int, tokens: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, bundle, memory, str(context), str(tokens)],
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"refused": done.stderr.strip().splitlines()[-1]}


if __name__ == "__main__":
    bundle = sys.argv[1]
    mib = 1 << 20
    print(f"{'budget':>8} {'context':>8} {'prompt':>7} {'planned':>8} {'opened':>8} {'peak':>8}  peak/budget  (MiB)")
    for context in (512, 2048):
        for memory in ("none", str(80 * mib), str(48 * mib), str(36 * mib), str(28 * mib)):
            for tokens in (1, 130, context - 8):
                got = measure(bundle, memory, context, tokens)
                shown = "none" if memory == "none" else f"{int(memory) / mib:.0f}"
                if "refused" in got:
                    print(f"{shown:>8} {context:>8} {tokens:>7} {got['refused'][:90]}")
                    break
                budget = got["plan"] if memory == "none" else int(memory)
                print(
                    f"{shown:>8} {context:>8} {tokens:>7} {got['plan'] / mib:>8.1f} {got['opened'] / mib:>8.1f} "
                    f"{got['peak'] / mib:>8.1f}  {got['peak'] / budget:>10.2f}"
                )
