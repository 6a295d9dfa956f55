"""The options that several commands of `smoe` share, and the engine that they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import STATE_KINDS
from smoe.runtime import allowance
from smoe.runtime.bits import BITS
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.cache import ORDERS
from smoe.runtime.cache.eviction import EVICTIONS
from smoe.runtime.cache.storage import IO
from smoe.runtime.choosers import SUBSTITUTIONS
from smoe.runtime.draft.named import DRAFTS
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import EXECUTORS, Execution, divide
from smoe.runtime.options import PREFETCHES, Policies, tables_bytes
from smoe.runtime.sampling import Sampling
from smoe.runtime.sizes import parse_size, show_size
from smoe.runtime.trace import PLAIN, Makers

POLICIES = Policies()
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(*options: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
engine_options = _options(
    click.argument("bundle", type=click.Path(path_type=Path)),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Bound for the whole process, like 512MiB. Default: what the machine and its "
        "container leave, less a reserve.",
    ),
    click.option(
        "--context",
        type=int,
        metavar="TOKENS",
        help="Longest sequence. Default: 2048, or the model's own.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Threads of backbone and experts. Default: as many as there are processor cores; ONNX "
        "Runtime's segments as many as pay.",
    ),
    click.option(
        "--executor",
        default="auto",
        show_default=True,
        help=f"What runs the backbone: {', '.join(EXECUTORS)}. auto: the bundle's program where it "
        "has one, ONNX Runtime for the rest.",
    ),
    click.option(
        "--state",
        help=f"What the program keeps of a sequence: {', '.join(STATE_KINDS)}. LOSSY where that is "
        "narrower than the bundle's own, which is the default.",
    ),
    click.option(
        "--level", type=int, help="LOSSY. Planes of every expert to read. Default: all, lossless."
    ),
    click.option(
        "--eviction",
        help=f"Which resident expert goes: {', '.join(EVICTIONS)}. Default: {POLICIES.eviction}.",
    ),
    click.option(
        "--shares",
        is_flag=True,
        help="Every layer has an equal part of the experts' memory for itself.",
    ),
    click.option(
        "--cold", is_flag=True, help="Start with no expert in memory instead of the most used ones."
    ),
    click.option(
        "--prefetch",
        help=f"What is read on a guess: {', '.join(PREFETCHES)}. Default: {POLICIES.prefetch}.",
    ),
    click.option(
        "--order",
        help=f"Which planes are read first of those that a step waits for: {', '.join(ORDERS)}. "
        f"Default: {POLICIES.order}, those that most tokens wait for.",
    ),
    click.option(
        "--io",
        help=f"How records are read: {' or '.join(IO)}. Default: the better one, by a measurement.",
    ),
    click.option(
        "--substitution",
        metavar="NAME[:NUMBER]",
        help=f"LOSSY. What stands in for a missing expert: {', '.join(SUBSTITUTIONS)}. Default: "
        "none, lossless.",
    ),
    click.option(
        "--loss",
        type=float,
        metavar="NATS",
        help="LOSSY. Rise of KL divergence per token that may be spent on reading less, like 0.01. "
        "Default: 0, lossless.",
    ),
    click.option(
        "--bits",
        metavar="NAME[:MEAN]",
        help=f"LOSSY. By what every slot gets its level, and the mean bits: {', '.join(BITS)} "
        "(the last two are controls), like priced:3.1. Default: all bits, lossless.",
    ),
    click.option(
        "--draft",
        metavar="NAME[:MOST]",
        help=f"What guesses up to so many tokens that a step checks together: {', '.join(DRAFTS)}. "
        "It changes no token. Default: none.",
    ),
)
ENGINE_NAMES = (
    "memory",
    "context",
    "threads",
    "executor",
    "state",
    "level",
    "io",
    "eviction",
    "shares",
    "cold",
    "prefetch",
    "order",
    "substitution",
    "loss",
    "bits",
    "draft",
)
NEW_TOKENS = 64  # of a continuation; an answer may have half of the context
generation_options = _options(
    click.option(
        "--max-new-tokens",
        type=int,
        help=f"Default: {NEW_TOKENS}, or in a chat half of the context.",
    ),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Draw from the k best tokens only."),
    click.option(
        "--top-p", type=float, default=1.0, help="Draw from the smallest set of this probability."
    ),
    click.option("--seed", type=int, help="Makes a draw repeat."),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End before this text, which may be a special token's. May be given several times.",
    ),
    click.option(
        "--special", is_flag=True, help="Print the text of special tokens too, as they were made."
    ),
)
session_option = click.option(
    "--session",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Go on from what FILE holds of the tokens before, if it is there, and leave in it what is "
    "there at the end. It goes with this bundle, executor and state.",
)


def refuse_generation(options: dict[str, Any]) -> None:
    """An `EngineError` for what of `generation_options` no bundle could do, before one is
    loaded."""
    how = (options[name] for name in ("temperature", "top_k", "top_p", "seed"))
    Sampling(*how)
    most = options["max_new_tokens"]
    if most is not None and most < 1:
        raise EngineError(f"--max-new-tokens is {most}; at least 1 is wanted.")


def open_engine(bundle: Path, options: dict[str, Any], makers: Makers = PLAIN) -> Engine:
    """The engine that the options of `engine_options` ask for, for as many `requests` as there may
    be among them, which hold so much; they are taken out of `options`."""
    asked = {name: options.pop(name) for name in ENGINE_NAMES}
    many = {name: options.pop(name) for name in ("requests", "held") if name in options}
    return Engine.open(
        bundle,
        memory=asked["memory"],
        context=asked["context"],
        threads=asked["threads"],
        level=asked["level"],
        policies=_policies(asked),
        io=asked["io"],
        executor=asked["executor"],
        state=asked["state"],
        **many,
        makers=makers,
    )


def open_exact_twin(bundle: Path, options: dict[str, Any], log: Callable[[str], None]) -> Engine:
    """The same engine without what is lossy: what its quality is compared with. Where the full
    level of an expert needs more memory than was stated, it gets that, and `log` hears of it."""
    lossy = ("level", "substitution", "loss", "bits", "draft")  # which goes with none of these
    exact = options | dict.fromkeys(lossy)
    opened, execution = open_bundle(bundle), Execution(options["executor"], options["state"])
    if divide(opened.manifest, opened.program, execution).narrower:
        exact["state"], execution = None, Execution(options["executor"])
    if options["memory"] is not None:
        policies, stated = _policies(exact), parse_size(options["memory"])
        tables = tables_bytes(policies, opened)
        plan = plan_memory(opened, None, options["context"], tables=tables, execution=execution)
        plan = dataclasses.replace(plan, process=allowance.process(plan, stated))
        if stated < plan.minimum:
            exact["memory"] = plan.minimum
            needs = show_size(plan.minimum, up=True)
            log(f"exact run for comparison: needs {needs}, beyond --memory")
    return open_engine(bundle, exact)


def _policies(asked: dict[str, Any]) -> Policies:
    names = ("eviction", "prefetch", "order", "substitution", "loss", "bits", "draft")
    given = {name: asked[name] for name in names if asked[name] is not None}
    return Policies(shares=asked["shares"], warm=not asked["cold"], **given)
