"""What a state in fewer bits costs and saves: KL after 2,000 and 8,000 tokens, bytes, speed.

The example model was made for 2,048 tokens. It is stretched to 8,192 by yarn in its config, which
keeps its weights: what is compared is one model with itself, its state kept in another type.
Experts and backbone are float32, so that nothing else is rounded.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.contexts import KINDS
from bench.harness import Rows, Run, Table, bench, child, interleave, note, option, spread
from bench.models import CALIBRATION, EXAMPLE, build
from bench.outofcore import tokens_of
from smoe.artifacts import SmoeError, open_bundle
from smoe.runtime import Engine
from smoe.runtime.evaluate import log_softmax
from smoe.runtime.execution import Execution, divide

FACTOR = 4.0  # of yarn, over the tokens that the example was made for
TAIL = 512  # tokens up to a length whose logits are compared

Logits = dict[int, list[np.ndarray]]  # by length, of each text: float32 [TAIL, vocabulary]


@bench(
    options.TEXT, options.tokens(32), options.rounds(3),
    option("--directory", type=Path, required=True, help="where the bundle is, or is made"),
    option("--lengths", type=int, nargs="+", default=[2000, 8000]),
    option("--texts", type=int, default=4, help="of the longest length"),
    option("--kinds", nargs="+", choices=KINDS, default=list(KINDS)),
    option("--threads", type=int, default=2),
)  # fmt: skip
def state(run: Run) -> Rows:
    """KL of states in float16 and int8 against float32 in long contexts, bytes and speed.

    KL is of the last 512 tokens before each length, in nats per token, with 1.96 standard errors,
    of tokens as if they were independent; speed is of tokens decoded after that length.
    """
    bundle, longest = stretched(run.directory), max(run.lengths)
    ids = tokens_of(bundle, run.text, run.texts * longest)
    texts = [np.array(ids[n * longest : (n + 1) * longest]) for n in range(run.texts)]
    exact = _logits(bundle, "f32", texts, run)
    losses: dict[str, list[list[float]]] = {}
    refused: dict[str, str] = {}
    for kind in run.kinds:
        try:
            other = exact if kind == "f32" else _logits(bundle, kind, texts, run)
        except SmoeError as error:
            refused[kind] = str(error)
            note(f"{kind}: {error}")
            continue
        losses[kind] = [_kl(exact[length], other[length]) for length in run.lengths]
    speeds = _speeds(run, bundle, list(losses))
    lines: list[list[Any]] = []
    for kind in run.kinds:
        if kind in refused:
            lines.append([f"{kind}: {refused[kind]}", *[None] * (1 + 2 * len(run.lengths))])
        else:
            lines.append([kind, _bytes(bundle, kind, longest), *losses[kind], *speeds[kind]])
    columns = {"state": "{}", "bytes a token": "{:.0f}"}
    columns |= {f"KL at {length}": "{:.2g} ± {:.1g}" for length in run.lengths}
    columns |= {f"tokens/s at {length}": "{:.1f}" for length in run.lengths}
    title = f"{run.texts} texts of {longest} tokens of {run.text.name}"
    yield Table("state", columns, lines, title)


def stretched(directory: Path) -> Path:
    """The bundle of the example with positions that reach four times as far."""
    bundle, model = directory / "stretched.smoe", directory / "stretched"
    if bundle.exists():
        return bundle
    shutil.copytree(EXAMPLE, model, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text("utf-8"))
    made_for = config["max_position_embeddings"]
    config["rope_parameters"] |= {
        "rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": made_for
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    how = ("--encoding", "f32", "--tokens", "2048", "--prices", "0", "--self", "0")
    build(model, bundle, CALIBRATION, *how)
    shutil.rmtree(model)
    return bundle


def _logits(bundle: Path, kind: str, texts: list[np.ndarray], run: Run) -> Logits:
    """Before each length. A `SmoeError` for a kind of state that there is not."""
    context = max(run.lengths)
    with Engine.open(bundle, context=context, state=kind, threads=run.threads) as engine:
        note(*engine.mode_lines()[:3])
        whole = [engine.logits(text) for text in texts]
    return {length: [one[length - TAIL : length].copy() for one in whole] for length in run.lengths}


def _kl(exact: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """Mean and 1.96 standard errors, in nats per token."""
    values = []
    for p, q in zip(map(log_softmax, exact), map(log_softmax, other), strict=True):
        values.append((np.exp(p) * (p - q)).sum(-1))
    losses = np.concatenate(values)
    return [float(losses.mean()), float(1.96 * losses.std() / len(losses) ** 0.5)]


def _bytes(bundle: Path, kind: str, tokens: int) -> float:
    """Of a token of a sequence of so many, by the plan."""
    opened = open_bundle(bundle)
    division = divide(opened.manifest, opened.program, Execution(state=kind))
    return division.state_bytes(tokens) / tokens


def _speeds(run: Run, bundle: Path, kinds: list[str]) -> dict[str, list[float]]:
    """Tokens per second of each kind after each length, medians of the rounds."""
    vocabulary = open_bundle(bundle).manifest.model.vocabulary
    settings = {
        "model": bundle, "threads": run.threads, "executor": "auto", "vocabulary": vocabulary,
        "positions": [length - run.tokens for length in run.lengths], "prompt": TAIL,
        "tokens": run.tokens,
    }  # fmt: skip
    ways = {kind: partial(child, "contexts:smoe", state=kind, **settings) for kind in kinds}
    answers = interleave(ways, run.rounds)
    return {
        kind: [
            spread([answer[str(position)] for answer in answers[kind]]).median
            for position in settings["positions"]
        ]
        for kind in kinds
    }
