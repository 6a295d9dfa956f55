"""How well a shadow of fewer bits knows the experts that the model will use (OD-MoE's SEP), token
by token, aligned with the model in what it read, in what it remembers, in both or in neither;
beside guesses that need no shadow.

The model draws its text at temperature 1 with a seed, since greedy text goes in circles. Recall is
the share of a layer's experts that the guess has among as many, over layers and prompts."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, note, option
from smoe.artifacts import SmoeError
from smoe.runtime import Engine, Policies
from smoe.runtime.cache.predict import Predictor
from smoe.runtime.evaluate import read_documents, rows
from smoe.runtime.options import make_predictor
from smoe.runtime.routing import Assignment, Available, Routed
from smoe.runtime.sampling import Sampler, Sampling
from smoe.runtime.step import Phase, Span, Step

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens that recall is said for, and up to which
ALIGNMENTS = {"token and state": (True, True), "token": (True, False), "state": (False, True),
              "none": (False, False)}  # fmt: skip
PREDICTORS = ("previous", "transition", "predicted:1")


@bench(
    options.TEXT, option("--bundle", type=Path, required=True, help="of the model itself"),
    option("--shadows", nargs="+", required=True, metavar="BUNDLE[:LEVEL]"),
    option("--aligned", nargs="+", choices=ALIGNMENTS, default=["token and state"]),
    option("--prompts", type=int, default=20), option("--prompt", type=int, default=64),
    option("--tokens", type=int, default=512, help="that the model draws after each"),
    option("--seed", type=int, default=0),
)  # fmt: skip
def shadow(run: Run) -> Rows:
    """Recall of shadows in fewer bits, by token and alignment, beside other predictors."""
    how = {"context": run.prompt + run.tokens, "threads": 1, "state": "f32"}
    found: dict[str, list[list[float]]] = defaultdict(list)
    with ExitStack() as opened:
        heard, model = _opened(run.bundle, None, how, opened)
        guesses = [_Predictors(model, heard)]
        for name in run.shadows:
            bundle, _, level = name.partition(":")
            its, engine = _opened(Path(bundle), int(level) if level else None, how, opened)
            guesses += [_Shadow(f"{name}, {one}", engine, its, one) for one in run.aligned]
        texts = rows(model, read_documents(run.text), run.prompts * run.prompt, run.prompt)
        for number, prompt in enumerate(texts):
            note(f"prompt {number + 1} of {len(texts)}")
            seed = run.seed + number
            for name, recalls in _followed(model, heard, guesses, prompt, run.tokens, seed).items():
                found[name].append(recalls)
    ends = [end for end in EDGES if end <= run.tokens]
    columns = {"guesses of": "{}", "all": "{:.2%}"} | {f"to {end}": "{:.1%}" for end in ends}
    lines: list[list[Any]] = []
    for name, recalls in found.items():
        every = np.array(recalls)  # [prompts, tokens]
        starts = [0, *ends[:-1]]
        means = [every[:, low:high].mean() for low, high in zip(starts, ends, strict=True)]
        lines.append([name, every.mean(), *means])
    title = f"{len(texts)} prompts of {run.prompt} tokens, {run.tokens} drawn after each"
    yield Table("shadow", columns, lines, title)


class Heard:
    """A chooser that keeps what routers say of a token, and computes at a `level` (None: all)."""

    def __init__(self, level: int | None):
        self.level, self.routed = level, dict[int, Routed]()

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        self.routed[routed.layer] = routed
        levels = None if self.level is None else np.full(routed.ids.shape, self.level)
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels)


def _opened(
    bundle: Path, level: int | None, how: dict[str, Any], opened: ExitStack
) -> tuple[Heard, Engine]:
    heard = Heard(level)
    policies = Policies(substitution=heard)
    return heard, opened.enter_context(Engine.open(bundle, policies=policies, **how))


class _Follower:
    """A sequence of an engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def begin(self, prompt: np.ndarray) -> None:
        self.sequence = self._engine.new_sequence()
        self.logits = self._engine.prefill(self.sequence, prompt).finish()[-1]

    def step(self, token: int) -> None:
        span = Span(self.sequence, np.array([token]), np.array([0]), Phase.DECODE)
        self.logits = self._engine.step(Step((span,)))[0][0]


class _Shadow(_Follower):
    """Another engine, which runs a token before the model does."""

    def __init__(self, name: str, engine: Engine, heard: Heard, alignment: str):
        super().__init__(engine)
        self.name, self._heard = name, heard
        self._of_token, self._of_state = ALIGNMENTS[alignment]

    def start(self, prompt: np.ndarray, seed: int) -> None:
        self.begin(prompt)
        self._sampler = Sampler(Sampling(1.0, seed=seed))

    def guess(self, model: _Follower, token: int) -> None:
        """What it would use for the next token, which is `token`."""
        own = self._sampler.draw(self.logits)
        if self._of_state:
            length = model.sequence.length
            arrays = {name: np.array(a) for name, a in model.sequence.state.arrays(length)}
            self.sequence.state.load(arrays, length)
            self.sequence.ids = list(model.sequence.ids)
        self._heard.routed.clear()
        self.step(token if self._of_token else own)

    def guessed(self) -> dict[str, dict[int, list[int]]]:
        """By layer."""
        said = self._heard.routed
        return {self.name: {layer: routed.ids[0].tolist() for layer, routed in said.items()}}


class _Predictors:
    """What can be guessed a layer ahead of the model, by what it said."""

    def __init__(self, engine: Engine, heard: Heard):
        self._heard, self._predictors = heard, dict[str, Predictor]()
        for name in PREDICTORS:
            with suppress(SmoeError):  # the bundle may lack what it needs
                self._predictors[name] = make_predictor(name, engine.manifest, engine.bundle.tables)

    def start(self, prompt: np.ndarray, seed: int) -> None:
        pass

    def guess(self, model: _Follower, token: int) -> None:
        pass

    def guessed(self) -> dict[str, dict[int, list[int]]]:
        """By layer; nothing of those that they have no guess for. `Previous` guesses a layer's
        experts when the layer before speaks, by what it heard a token ago."""
        found: dict[str, dict[int, list[int]]] = {name: {} for name in self._predictors}
        for layer in sorted(self._heard.routed):
            for name, predict in self._predictors.items():
                for target, expert in predict(self._heard.routed[layer]):
                    if target > layer:  # else it is about the next token
                        found[name].setdefault(target, []).append(expert)
        return found


def _followed(
    engine: Engine, heard: Heard, guesses: list[Any], prompt: np.ndarray, tokens: int, seed: int
) -> dict[str, list[float]]:
    """Recall at every token that the model draws after `prompt`."""
    model, sampler = _Follower(engine), Sampler(Sampling(1.0, seed=seed))
    model.begin(prompt)
    for one in guesses:
        one.start(prompt, seed)
    recalls: dict[str, list[float]] = defaultdict(list)
    for _ in range(tokens):
        token = sampler.draw(model.logits)
        for one in guesses:
            one.guess(model, token)
        model.step(token)
        for one in guesses:
            for name, by_layer in one.guessed().items():
                shares = [
                    len({*by_layer[layer][: routed.ids.shape[1]]} & {*routed.ids[0].tolist()})
                    / routed.ids.shape[1]
                    for layer, routed in heard.routed.items()
                    if layer in by_layer
                ]
                recalls[name].append(float(np.mean(shares)))
    return recalls
