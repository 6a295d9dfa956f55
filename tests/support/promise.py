"""The promise of a stated memory, tried: a process inside a memory cgroup of just that size, which
fills the context.

    python -m support.promise BUNDLE MEMORY CONTEXT PROMPT
"""

from __future__ import annotations

import collections
import json
import os
import sys
from pathlib import Path

from bench import cgroup, page_cache
from smoe.runtime import Engine
from smoe.runtime.system import peak_memory

TESTS = Path(__file__).parents[1]


def kept(bundle: Path, least: int, context: int, prompt: int) -> list[dict]:
    """What became of such processes at `least`, 1.1 and 2 times that, none of the bundle's files in
    the page cache; an `AssertionError` where one was killed, failed or held more."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    told = []
    for memory in (least, 11 * least // 10, 2 * least):
        page_cache.drop(page_cache.files_under(bundle))
        command = [sys.executable, "-m", "support.promise", str(bundle), str(memory)]
        with cgroup.Group("promise", memory) as group:
            done = group.run([*command, str(context), str(prompt)], timeout=60, env=environment)
        assert not done.killed and done.code == 0, (memory, done.err)
        told.append(json.loads(done.out))
        assert told[-1]["held"] <= memory and done.peak <= memory, (memory, told[-1])
        assert told[-1]["tokens"] == context
    return told


def _fill(bundle: str, memory: int, context: int, prompt: int) -> dict:
    with Engine.open(bundle, memory=memory, context=context) as engine:
        vocabulary = engine.bundle.manifest.model.vocabulary
        ids = [7919 * position % vocabulary for position in range(context)]
        steps = enumerate(engine.score(ids, prompt=prompt))
        ((after, last),) = collections.deque(steps, maxlen=1)  # logits of all would be ours to pay
        return {
            "held": peak_memory(),
            "tokens": prompt + after,
            "experts": engine.plan.capacity,
            "total": engine.plan.total,
            "logits": last.tobytes().hex()[:4096],
        }


if __name__ == "__main__":
    print(json.dumps(_fill(sys.argv[1], *map(int, sys.argv[2:]))))
