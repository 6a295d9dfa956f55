"""What a budget and its policies give on a text: speed, hits, and what it costs in quality.

The text is teacher-forced, so that every policy sees the same demand: the first tokens of a row as
a prompt, the others one decode step each. Quality is compared token by token with the exact run,
since wide batches hide what a shortcut does to one token. The choice task is an accuracy that
people can picture: does the model prefer the true continuation of a text to those of three other
texts of its domain?
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import BitLedger
from smoe.runtime.sizes import show_size
from smoe.runtime.system import peak_memory, reset_peak_memory
from smoe.runtime.text import read_text

SIZES = ("bytes_read", "peak_memory")  # figures of `bench` by unit: bytes,
SHARES = (
    "hit_rate_before", "hit_rate_after", "substituted_share", "loaded_share", "stall_share",
    "foresight_share", "top1",
    "choice_accuracy", "choice_accuracy_exact", "choice_same",
)  # fmt: skip
TIMES = ("ttft", "tpot", "tpot_longest")  # seconds
Measured = dict[str, Any]  # figures by name; None where there is none
OPTIONS = 4  # of an item of the choice task: the true continuation and three others


@dataclass(frozen=True)
class Item:
    """One question of the choice task: which of `options` continues `context`? The first one
    does."""

    context: np.ndarray
    options: tuple[np.ndarray, ...]


def bench(
    opened: Callable[[], Engine],
    exact_twin: Callable[[], Engine],
    text: Path,
    tokens: int,
    length: int,
    prompt: int,
    choices: int,
    log: Callable[..., None] = lambda *lines: None,
) -> Measured:
    """All of this page for the engine that `opened()` gives; `exact_twin()` is one that loses
    nothing, and is opened only where the engine is lossy. `text` is cut into rows of `length`,
    `tokens` in all; `choices` questions. `log` receives the mode lines."""
    documents = read_documents(text)
    with opened() as engine:
        texts = rows(engine, documents, tokens, length)
        questions = items(engine, documents, choices) if choices else []
        if engine.lossless:
            log(*engine.mode_lines())
            return _measured(engine, texts, prompt, questions)
    with _scratch() as scratch:
        with exact_twin() as twin:
            reference = exact(twin, texts, prompt, Path(scratch) / "exact")
            answers = choose(twin, questions)
        reset_peak_memory()
        with opened() as engine:
            log(*engine.mode_lines())
            return _measured(engine, texts, prompt, questions, reference, answers)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise EngineError(
            "The exact run's logits need a folder for temporary files, and there is none "
            f"({error.strerror}); set TMPDIR to one."
        ) from error


def _measured(
    engine: Engine,
    texts: list[np.ndarray],
    prompt: int,
    questions: list[Item],
    reference: Exact | None = None,
    answers: np.ndarray | None = None,
) -> Measured:
    results = measure(engine, texts, prompt, reference)
    return results | (graded(choose(engine, questions), answers) if questions else {})


def bench_lines(measured: Measured) -> list[str]:
    """What `bench` returned, for people: one figure a line."""
    return [
        f"{name.replace('_', ' '):20} {_shown(name, value)}"
        for name, value in measured.items()
        if value is not None
    ]


def _shown(name: str, value: float) -> str:
    if name in SIZES:
        return show_size(int(value))
    if name in SHARES:
        return f"{value:.1%}"
    if name in TIMES:
        return f"{value * 1000:.1f} ms"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_documents(path: Path) -> list[tuple[str, str]]:
    """(domain, text) of a .jsonl file with `text` and perhaps `domain`, or the one text of any
    other file."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [("", text)]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["text"], str):
                raise ValueError("text is no string")
            documents.append((str(record.get("domain", "")), record["text"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError(
                f'{path}, line {number}: {{"text": ..., "domain": ...}} is wanted ({error}).'
            ) from error
    return documents


def rows(
    engine: Engine, documents: Sequence[tuple[str, str]], tokens: int, length: int
) -> list[np.ndarray]:
    """Up to `tokens` token ids in rows of up to `length`, one row after another from every document
    in turn."""
    encoded = [np.array(engine.text.encode(text), np.int64) for _, text in documents]
    longest = max(map(len, encoded), default=0)
    pieces = [ids[at : at + length] for at in range(0, longest, length) for ids in encoded]
    texts: list[np.ndarray] = []
    for piece in pieces:
        left = tokens - sum(len(row) for row in texts)
        if min(left, len(piece)) >= 2:
            texts.append(piece[:left])
    if not texts:
        raise EngineError(
            f"The text has no row of 2 tokens and more within {tokens} tokens; give more text."
        )
    return texts


def items(
    engine: Engine,
    documents: Sequence[tuple[str, str]],
    count: int,
    context: int = 48,
    option: int = 12,
    seed: int = 0,
) -> list[Item]:
    """`count` questions: contexts of `context` tokens with continuations of `option` tokens, from
    documents of one domain each, at places drawn with `seed`."""
    domains: dict[str, list[np.ndarray]] = {}
    for domain, text in documents:
        ids = np.array(engine.text.encode(text), np.int64)
        if len(ids) >= context + option:
            domains.setdefault(domain, []).append(ids)
    usable = [texts for texts in domains.values() if len(texts) >= OPTIONS]
    if not usable:
        raise EngineError(
            f"The choice task wants {OPTIONS} documents of {context + option} tokens in one "
            "domain; give more text."
        )
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        texts = usable[number % len(usable)]
        chosen = random.choice(len(texts), OPTIONS, replace=False)
        starts = [int(random.integers(0, len(texts[i]) - context - option + 1)) for i in chosen]
        cut = [
            texts[i][start + context : start + context + option]
            for i, start in zip(chosen, starts, strict=True)
        ]
        made.append(Item(texts[chosen[0]][starts[0] : starts[0] + context], tuple(cut)))
    return made


@dataclass(frozen=True)
class Exact:
    """Log-probabilities of an exact run, kept in `file`: `exact[position]` is float32
    `[vocabulary]`. They are read one by one: pages of a mapped file would count as memory that
    this process holds when it opens the next engine."""

    file: Path
    vocabulary: int

    def __getitem__(self, position: int) -> np.ndarray:
        offset = 4 * self.vocabulary * position
        return np.fromfile(self.file, np.float32, self.vocabulary, offset=offset)


def exact(engine: Engine, texts: Sequence[np.ndarray], prompt: int, file: Path) -> Exact:
    """Log-probabilities after every scored position of `texts`, kept in `file`."""
    with open(file, "wb") as opened:
        for row in texts:
            for logits in engine.score(row, _prompt(row, prompt)):
                log_softmax(logits).astype(np.float32).tofile(opened)
    return Exact(file, engine.manifest.model.vocabulary)


def measure(
    engine: Engine, texts: Sequence[np.ndarray], prompt: int, reference: Exact | None = None
) -> Measured:
    """Run `engine` over `texts`, of which the first `prompt` tokens of each are a prompt. With
    `reference` (from `exact`) also the KL divergence from it in nats per token, with its standard
    error, and how often both have the same best token. Times are those of the engine, in
    seconds."""
    engine.reset_stats()
    nats, kl, same, first = [], [], [], []
    at = 0
    for row in texts:
        before = engine.stats.prefill_seconds
        start = _prompt(row, prompt)
        for position, logits in enumerate(engine.score(row, start), start):
            if position == start:
                first.append(engine.stats.prefill_seconds - before)
            q = log_softmax(logits)
            if position < len(row):
                nats.append(-float(q[row[position]]))
            if reference is not None:
                p = reference[at].astype(np.float64)
                kl.append(float((np.exp(p) * (p - q)).sum()))
                same.append(bool(p.argmax() == q.argmax()))
            at += 1
    results = _speed(engine, first) | {"perplexity": float(np.exp(np.mean(nats))) if nats else None}
    if reference is not None:
        results |= {
            "kl": float(np.mean(kl)),
            "kl_error": float(np.std(kl) / len(kl) ** 0.5),
            "top1": float(np.mean(same)),
        }
    return results


def choose(engine: Engine, questions: Sequence[Item]) -> np.ndarray:
    """The likeliest option of every question, int64 `[questions]`; 0 is the true continuation."""
    scores = [
        [_likelihood(engine, item.context, option) for option in item.options] for item in questions
    ]
    return np.array(scores).reshape(-1, OPTIONS).argmax(1)


def graded(answers: np.ndarray, exact: np.ndarray | None = None) -> Measured:
    """The share of right `answers` (from `choose`), and with those of the exact run also its share,
    and the share of questions that both answer alike: that tells policies apart by fewer questions
    than accuracy does, since each is its own control."""
    results = {"choice_accuracy": float(np.mean(answers == 0))}
    if exact is not None:
        results |= {
            "choice_accuracy_exact": float(np.mean(exact == 0)),
            "choice_same": float(np.mean(answers == exact)),
        }
    return results


def _likelihood(engine: Engine, context: np.ndarray, option: np.ndarray) -> float:
    ids = np.concatenate([context, option])
    logits = engine.score(ids[:-1], len(context), reuse=True)
    return sum(
        float(log_softmax(scores)[token]) for scores, token in zip(logits, option, strict=True)
    )


def _speed(engine: Engine, first: list[float]) -> Measured:
    stats, ledger = engine.stats, engine.sequence.ledger
    seconds = stats.prefill_seconds + stats.decode_seconds
    decoded, steps = stats.decoded, stats.decode_steps
    return {
        "tokens": stats.prompt_tokens + decoded,
        "ttft": float(np.median(first)),
        "tpot": stats.decode_seconds / max(1, decoded),
        "tokens_per_second": decoded / stats.decode_seconds if steps else None,
        "hit_rate_before": stats.wanted_hit_rate,
        "hit_rate_after": stats.hit_rate,
        "substituted_share": stats.substituted_share,
        "loaded_share": stats.misses / max(1, stats.wanted),
        "nats_spent": stats.nats_spent / max(1, stats.prompt_tokens + decoded),
        "mean_bits": ledger.mean if isinstance(ledger, BitLedger) else None,
        "bytes_read": stats.bytes_read,
        "stall_share": stats.stall_seconds / seconds if seconds else 0.0,
        "foresight_share": stats.foresight_seconds / seconds if seconds else 0.0,
        "guesses_read": stats.guesses_read,
        "guesses_used": stats.guesses_used,
        "peak_memory": peak_memory(),
    }


def _prompt(row: np.ndarray, prompt: int) -> int:
    return min(prompt, len(row))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 of float32 `[.., vocabulary]`."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
