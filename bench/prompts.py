"""What a prompt costs where the experts do not fit: bytes read, time, and what it leaves for
decoding."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import options
from bench.harness import Rows, Run, Table, bench, child, interleave, option, spread

MIB = 1 << 20
EARLY, LATE = (0, 32), (199, 231)  # decode steps after the prompt
SHARE = option("--share", type=float, default=0.4, help="of the experts that is in memory")


@bench(
    options.BUNDLE, options.TEXT, options.rounds(3), options.io("direct"), SHARE,
    option("--length", type=int, default=1500, help="tokens of the prompt"),
    option("--context", type=int, default=2048),
)  # fmt: skip
def prompt(run: Run) -> Rows:
    """A prompt with a share of the experts in memory: bytes, time, and the first tokens after it.

    Beside it the same prompt with everything in memory, one read of as many records as are missing,
    and the same text decoded token by token. Early tokens are the first 32 after the prompt, late
    ones the 200th to 232nd.
    """
    settings = {
        "bundle": run.bundle,
        "text": run.text,
        "length": run.length,
        "context": run.context,
    }
    results = interleave(
        {
            "limited": lambda: child("prompts:prompt_once", share=run.share, io=run.io, **settings),
            "resident": lambda: child("prompts:prompt_once", share=None, io=None, **settings),
            "decoded": lambda: child(
                "prompts:prompt_once", share=run.share, io=run.io, at_once=1, **settings
            ),
            "read": lambda: child(
                "prompts:read_missing", bundle=run.bundle, share=run.share, io=run.io
            ),
        },
        run.rounds,
    )  # fmt: skip
    limited, resident = results["limited"], results["resident"]
    seconds = {n: spread([r["seconds"] for r in rs]).median for n, rs in results.items()}
    longer = max(seconds["resident"], seconds["read"])
    early, late = (spread([r[n] for r in limited]).median for n in ("early", "late"))
    before, after = (spread([r[n] for r in results["decoded"]]).median for n in ("early", "late"))
    read, experts = spread([r["bytes_read"] for r in limited]).median, limited[0]["experts"]
    same = {r["logits"] for r in limited} == {r["logits"] for r in resident}
    lines = [
        ["bytes read, MB", f"{read / 1e6:.1f}"],
        ["of all experts", f"{read / experts:.3f}"],
        ["seconds", f"{seconds['limited']:.3f}"],
        ["seconds, everything in memory", f"{seconds['resident']:.3f}"],
        ["seconds, one read of what is missing", f"{seconds['read']:.3f}"],
        ["of the longer of both", f"{seconds['limited'] / longer:.3f}"],
        ["tokens/s, 1 to 32 after the prompt", f"{early:.1f}"],
        ["tokens/s, 200 to 232", f"{late:.1f}"],
        ["early / late", f"{early / late:.3f}"],
        ["early / late, the same text decoded", f"{before / after:.3f}"],
        ["MB a token, 1 to 32 after the prompt", f"{limited[0]['early_bytes'] / 1e6:.1f}"],
        [
            "MB a token, the same text decoded",
            f"{results['decoded'][0]['early_bytes'] / 1e6:.1f}",
        ],
        ["same logits as with everything in memory", "yes" if same else "no"],
    ]
    title = f"{run.length} tokens, {run.share:.0%} of the experts in memory, {run.io} reads"
    yield Table("prompt", {"": "{}", "measured": "{}"}, lines, title)


def prompt_once(
    bundle: str,
    text: str,
    length: int,
    context: int,
    share: float | None,
    io: str | None,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Read a prompt, `at_once` tokens of it (None: all) and the others one at a time, then the text
    that follows."""
    from bench.budgets import beside, budget_for_share
    from smoe.runtime import Engine

    how = {} if share is None else beside(budget_for_share(bundle, share, context))
    with Engine.open(bundle, context=context, io=io, **how) as engine:
        lines = Path(text).read_text("utf-8").splitlines()
        words = "\n".join(json.loads(line)["text"] for line in lines[:64])
        ids = engine.text.encode(words)[: length + LATE[1]]
        stream = engine.score(ids, prompt=at_once or length)
        logits, steps = next(stream), []
        for _ in range(length - (at_once or length)):
            logits = next(stream)
        read = [engine.stats.bytes_read]
        stats = {"bytes_read": engine.stats.bytes_read, "seconds": engine.stats.prefill_seconds}
        digest = hashlib.sha256(logits.tobytes())
        before = time.perf_counter()
        for logits in stream:
            steps.append(time.perf_counter() - before)
            read.append(engine.stats.bytes_read)
            digest.update(logits.tobytes())
            before = time.perf_counter()
    rates = {
        name: (stop - start) / sum(steps[start:stop])
        for name, (start, stop) in (("early", EARLY), ("late", LATE))
    }
    experts = engine.plan.experts * engine.plan.record
    rates["early_bytes"] = (read[EARLY[1]] - read[EARLY[0]]) / (EARLY[1] - EARLY[0])
    return stats | rates | {"experts": experts, "logits": digest.hexdigest()}


def read_missing(bundle: str, share: float, io: str) -> dict[str, float]:
    """Seconds of one read of as many records as do not fit, as the engine reads."""
    from bench.micro import READERS, read_rate
    from smoe.artifacts import open_bundle

    opened = open_bundle(bundle)
    layers = enumerate(opened.manifest.layers)
    records = [(layer, expert) for layer, spec in layers for expert in range(spec.experts)]
    missing = records[int(len(records) * share) :]
    rate, _ = read_rate(opened, missing, io, READERS)
    return {"seconds": len(missing) * opened.layouts[0].levels[-1] / rate / 1e9}


# -- a long one ------------------------------------------------------------------------


@bench(
    SHARE,
    options.io(None),
    option("--directory", type=Path, help="where the random bundle is, or is made"),
    option("--length", type=int, default=16384, help="tokens of the prompt"),
    option("--memory", help="of the process, instead of what holds the share of the experts"),
    option("--layers", type=int, default=4),
    option("--experts", type=int, default=64),
    option("--hidden", type=int, default=2048),
    option("--width", type=int, default=1024),
    option("--encoding", default="bf16"),
)
def longprompt(run: Run) -> Rows:
    """A long prompt on a random bundle: peak memory against the budget, and bytes read."""
    from bench.models import random_bundle
    from bench.random_models import Shape

    with tempfile.TemporaryDirectory() as scratch:
        context = run.length + 2 * LATE[1]
        shape = Shape(
            layers=run.layers, experts=run.experts, top_k=8, hidden=run.hidden, width=run.width,
            context=context,
        )  # fmt: skip
        name = f"random-{run.layers}x{run.experts}x{run.hidden}x{run.width}-{context}.smoe"
        options = ["--encoding", run.encoding, "--prices", "0"]
        if run.encoding.startswith("nested"):
            options += ["--quantiser", "nearest"]
        bundle = random_bundle((run.directory or Path(scratch)) / name, shape, 256, *options)
        done = child(
            "prompts:long_once", bundle=bundle, length=run.length, share=run.share, io=run.io,
            context=run.length + 1, memory=run.memory,
        )  # fmt: skip
    lines = [
        ["budget of the process, MiB", f"{done['budget'] / MIB:.1f}"],
        ["held before opening, MiB", f"{done['before'] / MIB:.1f}"],
        ["peak, MiB", f"{done['peak'] / MIB:.1f}"],
        ["peak / budget", f"{done['peak'] / done['budget']:.3f}"],
        ["bytes read, MB", f"{done['bytes_read'] / 1e6:.1f}"],
        ["of all experts", f"{done['bytes_read'] / done['experts']:.3f}"],
        ["seconds", f"{done['seconds']:.1f}"],
    ]
    yield Table(
        "longprompt", {"": "{}", "measured": "{}"}, lines, f"A prompt of {run.length} tokens"
    )
    yield Table("mode", {"mode": "{}"}, [[line] for line in done["mode"]], "What the engine chose")


def long_once(
    bundle: str, length: int, context: int, share: float, io: str | None, memory: str | None
) -> dict[str, Any]:
    """Read a prompt of random ids; bytes of memory at most, and read."""
    import numpy as np
    import onnxruntime  # noqa: F401  held before opening, wherever the runtime would load it

    from bench.budgets import beside, budget_for_share
    from smoe.artifacts import open_bundle
    from smoe.runtime import Engine
    from smoe.runtime.system import peak_memory, reset_peak_memory

    opened = open_bundle(bundle)
    how = {"memory": memory} if memory else beside(budget_for_share(bundle, share, context))
    ids = np.random.default_rng(0).integers(3, opened.manifest.model.vocabulary, length)
    reset_peak_memory()
    before = peak_memory()
    with Engine.open(bundle, context=context, io=io, **how) as engine:
        next(engine.score(ids, prompt=length))
        return {
            "budget": engine.plan.budget,
            "before": before,
            "peak": peak_memory(),
            "bytes_read": engine.stats.bytes_read,
            "experts": engine.plan.experts * engine.plan.record,
            "seconds": engine.stats.prefill_seconds,
            "mode": engine.mode_lines(),
        }
