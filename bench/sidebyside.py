"""One commit beside another: decode speed of the same bundles, run by run in turns.

The old commit is a folder that `pip install --no-deps --target DIR CHECKOUT` made; a process whose
path begins there runs it. It runs twice in every round, as two alternatives: what these two differ
by is the noise that a ratio has to be judged by. Both open the same files; where the old one would
not know the layout, they lie once more as version 3 has them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    interleave,
    note,
    option,
    spread,
)
from smoe.artifacts import open_bundle, safetensors_file, validate

CONTEXT = 512
WARM = 32  # tokens before the clock starts
SIDES = ("old", "old again", "new")


@dataclass(frozen=True)
class Case:
    """What is run: a share of the experts in memory (None: all of them), and a loss budget."""

    name: str
    bundle: Path
    share: float | None
    loss: float = 0.0


@bench(
    options.BUNDLE, options.TEXT, options.tokens(256), options.rounds(5), options.io("buffered"),
    option("--old", type=Path, required=True, help="site folder of the old commit"),
    option("--bundle2", type=Path, help="the padded model, with prices"),
    option("--share", type=float, default=0.4, help="of the experts, in the limited rows"),
    option("--loss", type=float, default=0.01, help="nats per token, in the last row"),
)  # fmt: skip
def sidebyside(run: Run) -> Rows:
    """Decode speed of this commit beside an old one, in turns, old beside old as the noise.

    kept: the median ratio new / old is at least .98, or lies within the ratios of old to old.
    """
    columns = {
        "": "{}", "old tok/s": "{:.1f}", "new tok/s": "{:.1f}",
        "new / old": "{:.3f} ({:.3f} to {:.3f})",
        "old / old": "{:.3f} ({:.3f} to {:.3f})", "kept": "{}",
        "same logits": "{}", "experts, old / new": "{} / {}",
    }  # fmt: skip
    lines = [_line(case, run) for case in _cases(run)]
    yield Table("sidebyside", columns, lines, f"{run.rounds} rounds, {run.tokens} tokens each")


def _cases(run: Run) -> list[Case]:
    limited, cases = f"{run.share:.0%}", []
    for name, path in (("example", run.bundle), ("padded", run.bundle2)):
        if path:
            bundle = version_3(path)
            cases += [
                Case(f"{name}, resident", bundle, None),
                Case(f"{name}, {limited}", bundle, run.share),
                Case(f"{name}, {limited}, --loss {run.loss:g}", bundle, run.share, run.loss),
            ]
    return cases


def version_3(bundle: Path) -> Path:
    """The same bundle as commits until 2026-11 read it, beside it, with links to its files: before
    version 4 there was no folder `study`."""
    opened = open_bundle(bundle)
    old = bundle.with_name(f"{bundle.stem}-v3.smoe")
    if not opened.manifest.study:
        return bundle
    if old.exists():
        return old
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    files, folder = manifest["files"], opened.manifest.study
    for name in list(files):
        to = old / name.removeprefix(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists():
            os.link(bundle / name, to)
        if name.startswith(folder):
            files.setdefault(name.removeprefix(folder), files[name])
            del files[name]
    tables = old / "tables.safetensors"
    tables.unlink()
    header = safetensors_file.read_header(bundle / tables.name)
    both = [safetensors_file.load(bundle / part / tables.name) for part in ("", folder)]
    safetensors_file.save(tables, both[0] | both[1], header.metadata)
    files[tables.name] = {"size": tables.stat().st_size, "sha256": validate.sha256(tables)}
    (old / "manifest.json").write_text(json.dumps(manifest | {"version": 3}), "utf-8")
    open_bundle(old)
    return old


def _line(case: Case, run: Run) -> list[Any]:
    note(case.name)
    results = interleave({side: _decoding(case, run, side) for side in SIDES}, run.rounds)
    speeds = {side: [result["rate"] for result in results[side]] for side in SIDES}

    def ratios(side: str) -> list[float]:
        return [a / b for a, b in zip(speeds[side], speeds["old"], strict=True)]

    new, noise = spread(ratios("new")), spread(ratios("old again"))
    kept = new.median >= 0.98 or noise.low <= new.median <= noise.high
    digests = {result["logits"] for side in SIDES for result in results[side]}
    return [
        case.name,
        spread(speeds["old"]).median,
        spread(speeds["new"]).median,
        [new.median, new.low, new.high],
        [noise.median, noise.low, noise.high],
        "yes" if kept else "no",
        "yes" if len(digests) == 1 else "no",
        [results[side][0]["experts"] for side in ("old", "new")],
    ]


def _decoding(case: Case, run: Run, side: str) -> Callable[[], dict[str, Any]]:
    """A function that runs one side of a case once, in a process of its own."""
    site = None if side == "new" else run.old
    settings = {"bundle": case.bundle, "share": case.share, "loss": case.loss, "io": run.io}
    return lambda: child(
        "sidebyside:decode",
        site=site,
        text=run.text,
        tokens=run.tokens,
        context=CONTEXT,
        **settings,
    )


def decode(
    bundle: str, share: float | None, loss: float, io: str, text: str, tokens: int, context: int
) -> dict[str, Any]:
    """Tokens per second of reading a text one token at a time, and a digest of all logits.

    Uses only what both commits have. The engine's own clock counts decode steps without what is
    done with the logits.
    """
    import hashlib

    from bench.budgets import beside, budget_for_share
    from smoe.runtime import Engine, Policies

    how: dict[str, Any] = {}
    if share is not None:
        how = {"io": io, **beside(budget_for_share(bundle, share, context))}
    with Engine.open(bundle, context=context, policies=Policies(loss=loss), **how) as engine:
        ids = engine.text.encode(_text(Path(text)))[:tokens]
        stream, digest = engine.score(ids), hashlib.sha256()
        for position, logits in enumerate(stream, 1):
            digest.update(logits.tobytes())
            if position == WARM:
                engine.reset_stats()
        stats = engine.stats
        return {
            "rate": stats.decode_steps / stats.decode_seconds,
            "bytes_read": stats.bytes_read,
            "experts": engine.plan.capacity,
            "logits": digest.hexdigest(),
        }


def _text(path: Path) -> str:
    """The first documents of JSON lines, long enough for any bench here."""
    lines = path.read_text("utf-8").splitlines()[:64]
    return "\n".join(json.loads(line)["text"] for line in lines)
