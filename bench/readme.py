"""The figures of README.md:  python bench/readme.py  (about five minutes on two cores)

Builds the example model in every encoding into a temporary directory, compares each with the original token by token on
held-out text, then decodes held-out text token by token under shrinking budgets: rounds interleaved, medians printed.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from smoe.artifacts import open_bundle
from smoe.artifacts.encodings import ENCODINGS
from smoe.prep.build import Recipe, build
from smoe.prep.calibration import Calibration
from smoe.prep.checkpoint import open_checkpoint
from smoe.prep.profile import profile
from smoe.prep.progress import Progress
from smoe.prep.verify import verify
from smoe.runtime import Engine, memory

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, CALIBRATION, HELDOUT = EXAMPLES / "reference", EXAMPLES / "calibration.jsonl", EXAMPLES / "heldout.jsonl"
QUIET = Progress(quiet=True)
CONTEXT, TOKENS, ROUNDS = 512, 300, 5


def encodings(scratch: Path) -> None:
    profiled = scratch / "profile"
    profiled.mkdir()
    profile(open_checkpoint(MODEL), profiled, Calibration(str(CALIBRATION)), QUIET)
    print("| encoding | bundle | perplexity | KL, nats per token | same best token |")
    print("|---|---|---|---|---|")
    for encoding in ENCODINGS:
        bundle = scratch / f"{encoding}.smoe"
        manifest = build(MODEL, bundle, None, Recipe(encoding), profiled, QUIET)
        found = verify(bundle, MODEL, Calibration(str(HELDOUT), tokens=4096, length=256), None, QUIET)
        if encoding == "f32":
            print(f"| original | | {found['perplexity_original']:.3f} | | |")
        size = sum(file.size for file in manifest.files.values()) / 1e6
        print(f"| {encoding} | {size:.1f} MB | {found['perplexity_bundle']:.3f} | "
              f"{found['kl_nats_per_token']:.1g} | {found['top1_agreement']:.2%} |")  # fmt: skip


def budgets(scratch: Path) -> None:
    bundle = scratch / "bf16.smoe"
    plan = memory.plan(open_bundle(bundle), None, CONTEXT)
    text = json.loads(HELDOUT.read_text("utf-8").splitlines()[0])["text"]
    shares = (1.0, 0.75, 0.5, 0.25, 0.125)
    engines = [Engine.open(bundle, plan.fixed + int(plan.experts * s) * plan.record, CONTEXT) for s in shares]
    ids = engines[0].text.encode(text)[:TOKENS]
    rates: list[list[float]] = [[] for _ in shares]
    for engine in engines:
        list(engine.score(ids[:50]))  # warm, and filled
    for _ in range(ROUNDS):
        for engine, rate in zip(engines, rates, strict=True):
            started = time.perf_counter()
            for _ in engine.score(ids):
                pass
            rate.append(TOKENS / (time.perf_counter() - started))
    print("\n| resident experts | budget | hits | tokens per second |\n|---|---|---|---|")
    for share, engine, rate in zip(shares, engines, rates, strict=True):
        print(f"| {share:.0%} ({engine.plan.capacity}) | {memory.show(engine.plan.total)} | "
              f"{engine.stats.hit_rate:.1%} | {statistics.median(rate):.0f} |")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        encodings(Path(directory))
        budgets(Path(directory))
