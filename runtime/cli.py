"""The commands of `smoe`: run, chat, info, verify. Text on stdout; mode lines and statistics on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from smoe.artifacts import open_bundle
from smoe.runtime.budget import MemoryPlan, plan_memory, show_size
from smoe.runtime.cache.eviction import EVICTIONS
from smoe.runtime.cache.storage import IO
from smoe.runtime.device_profile import measure_device
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.evaluate import bench as run_bench
from smoe.runtime.options import PREFETCHES, SUBSTITUTIONS, Policies
from smoe.runtime.stats import Stats
from smoe.runtime.text import StopWhen, read_text

POLICIES = Policies()
HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=HELP)
@click.version_option(package_name="smoe")
def cli() -> None:
    """Run a prepared mixture-of-experts model inside a memory budget."""


def _options(*options: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
_engine = _options(
    click.argument("bundle", type=click.Path(path_type=Path)),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Budget for everything the engine holds, like 64MiB. Default: all experts resident.",
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
        help="Threads of backbone and experts. Default: as many as pay, and as there are processors.",
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
        "--io",
        help=f"How records are read: {' or '.join(IO)}. Default: the better one, by a measurement.",
    ),
    click.option(
        "--substitution",
        metavar="NAME[:NUMBER]",
        help=f"LOSSY. What stands in for a missing expert: {', '.join(SUBSTITUTIONS)}. Default: none, lossless.",
    ),
    click.option(
        "--loss",
        type=float,
        metavar="NATS",
        help="LOSSY. Rise of KL divergence per token that may be spent on reading less, like 0.01. Default: 0, lossless.",
    ),
)
_ENGINE = (
    "memory",
    "context",
    "threads",
    "level",
    "io",
    "eviction",
    "shares",
    "cold",
    "prefetch",
    "substitution",
    "loss",
)
_generation = _options(
    click.option("--max-new-tokens", type=int, default=64, show_default=True),
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
        help="End before this text. May be given several times.",
    ),
)


def _open(bundle: Path, options: dict[str, Any]) -> Engine:
    """The engine that the options of `_engine` ask for; they are taken out of `options`."""
    asked = {name: options.pop(name) for name in _ENGINE}
    policies = {name: asked.pop(name) for name in ("eviction", "prefetch", "substitution", "loss")}
    given = {name: value for name, value in policies.items() if value is not None}
    return Engine.open(
        bundle,
        policies=Policies(shares=asked.pop("shares"), warm=not asked.pop("cold"), **given),
        **asked,
    )


@cli.command()
@_engine
@click.argument("prompt")
@_generation
@click.option(
    "--ids", is_flag=True, help="PROMPT is token ids, separated by spaces; so is the answer."
)
@_json
def run(
    bundle: Path,
    prompt: str,
    ids: bool,
    as_json: bool,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Generate from PROMPT ("-" reads it from stdin)."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with _open(bundle, options) as engine:
        _say(*engine.mode_lines())
        asked = _parse_ids(text) if ids else text
        tokens = []
        try:
            for token in engine.generate(asked, stop=StopWhen(stop), **options):
                tokens.append(token)
                if not as_json:
                    click.echo(f"{token.id} " if ids else token.text, nl=False)
        except KeyboardInterrupt:
            _say("", "cancelled")
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "text": "".join(token.text for token in tokens),
                        "ids": [token.id for token in tokens],
                        "stats": engine.stats.as_dict(),
                        "memory": _plan(engine.plan),
                    }
                )
            )
        else:
            click.echo()
            _say(_statistics(engine.stats))


@cli.command()
@_engine
@_generation
@click.option("--system", help="What the model is told before the first turn.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A Jinja template in place of the bundle's.",
)
@_json
def chat(
    bundle: Path,
    system: str | None,
    chat_template: Path | None,
    as_json: bool,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Talk, a line a turn; an empty line or end of input ends it. Ctrl-C cuts an answer short."""
    template = read_text(chat_template) if chat_template else None
    messages = [{"role": "system", "content": system}] if system else []
    with _open(bundle, options) as engine:
        engine.text.chat(
            [*messages, {"role": "user", "content": "?"}], template
        )  # no template: say so now
        _say(*engine.mode_lines())
        while line := _ask():
            turn = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(
                    engine, engine.text.chat(turn, template), stop, options, not as_json
                )
            except EngineError as error:  # the conversation so far is kept
                _say(f"smoe: {error}")
                continue
            messages = [*turn, {"role": "assistant", "content": answer}]
            click.echo(
                json.dumps({"text": answer, "stats": engine.stats.as_dict()}) if as_json else ""
            )
        if not as_json:
            _say(_statistics(engine.stats))


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _answer(
    engine: Engine, ids: list[int], stop: tuple[str, ...], generation: dict[str, Any], show: bool
) -> str:
    parts = []
    try:
        for token in engine.generate(ids, stop=StopWhen(stop), reuse=True, **generation):
            parts.append(token.text)
            if show:
                click.echo(token.text, nl=False)
    except KeyboardInterrupt:
        _say("", "cancelled")
    return "".join(parts)


@cli.command()
@_engine
@click.option(
    "--text", type=click.Path(path_type=Path), help="A .jsonl file with text and domain, or text."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=1024, show_default=True, help="How much of it."
)
@click.option(
    "--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a row."
)
@click.option(
    "--prompt",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens of a row read at once.",
)
@click.option(
    "--choices",
    type=click.IntRange(0),
    default=0,
    help="Questions of the choice task. Default: none.",
)
@click.option(
    "--device",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Measure this machine's reads, kernels and backbone instead, and write FILE for smoe-prep plan.",
)
@_json
def bench(
    bundle: Path,
    text: Path | None,
    tokens: int,
    length: int,
    prompt: int,
    choices: int,
    device: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure speed, hits, memory and quality on a text, teacher-forced; a lossy run is compared with the exact one."""
    if (text is None) == (device is None):
        raise click.UsageError(
            "Give either --text, to measure a run, or --device, to measure the machine."
        )
    if device is not None:
        measured = measure_device(bundle, options["io"])
        _write(device, measured.to_json())
        click.echo(measured.to_json().rstrip() if as_json else f"{device}: written")
        return
    assert text is not None
    found = run_bench(
        lambda **changed: _open(bundle, options | changed),
        text,
        tokens,
        length,
        prompt,
        choices,
        _say,
    )
    click.echo(json.dumps(found) if as_json else "\n".join(_bench_lines(found)))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise EngineError(f"{file} cannot be written: {error.strerror}.") from error


def _bench_lines(found: dict[str, Any]) -> list[str]:
    shown = []
    for name, value in found.items():
        if value is None:
            continue
        if name.endswith(("memory", "bytes_read")):
            value = show_size(value)
        elif name.endswith(
            ("rate_before", "rate_after", "share", "top1", "accuracy", "accuracy_exact", "same")
        ):
            value = f"{value:.1%}"
        elif name in ("ttft", "tpot"):
            value = f"{value * 1000:.1f} ms"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        shown.append(f"{name.replace('_', ' '):20} {value}")
    return shown


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--context", type=int, metavar="TOKENS", help="Longest sequence, for the memory figures."
)
@_json
def info(bundle: Path, context: int | None, as_json: bool) -> None:
    """Say what a bundle holds, and how much memory it needs."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    full, layers = plan_memory(opened, None, context), manifest.layers
    found: dict[str, Any] = {
        "model": manifest.model.model_type,
        "architecture": manifest.model.architecture,
        "moe_layers": len(layers),
        "experts": sum(layer.experts for layer in layers),
        "experts_per_token": full.token_cycle,
        "encoding": manifest.experts.encoding,
        "record_bytes": full.record,
        "backbone": manifest.backbone.precision,
        "vocabulary": manifest.model.vocabulary,
        "longest_context": manifest.model.context,
        "bytes": sum(file.size for file in manifest.files.values()),
        "context": full.context,
        "memory_minimum": full.fixed + full.smallest * full.record,
        "memory_one_token_cycle": full.fixed + full.token_cycle * full.record,
        "memory_all_resident": full.total,
        "substitution": next(
            (layer.routing_refusal for layer in layers if layer.routing is None), "possible"
        ),
        "provenance": manifest.provenance,
    }
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        sized = isinstance(value, int) and (name.startswith("memory") or name.endswith("bytes"))
        shown = show_size(value) if sized else value
        click.echo(_printable(f"{name.replace('_', ' '):24} {shown}"))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_json
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file of a bundle against its manifest: sizes, layout and SHA-256. Integrity, not origin."""
    manifest = open_bundle(bundle, hashes=True).manifest
    size = sum(file.size for file in manifest.files.values())
    if as_json:
        click.echo(json.dumps({"ok": True, "files": len(manifest.files), "bytes": size}))
    else:
        click.echo(
            f"{bundle}: {len(manifest.files)} files, {show_size(size)}, all as the manifest says"
        )


def _printable(text: str) -> str:
    """Without what a terminal would obey: the manifest is somebody else's."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise EngineError(
            f"--ids wants token ids separated by spaces, not {text[:40]!r}."
        ) from error


def _plan(plan: MemoryPlan) -> dict[str, int | None]:
    return {
        "budget": plan.budget,
        "total": plan.total,
        "backbone": plan.backbone,
        "state": plan.state,
        "workspace": plan.workspace,
        "record": plan.record,
        "resident_experts": plan.capacity,
        "experts": plan.experts,
    }


def _statistics(stats: Stats) -> str:
    rate = (
        f"{stats.decode_steps / stats.decode_seconds:.1f} tok/s"
        if stats.decode_steps
        else "no decode"
    )
    return (
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ({rate}, "
        f"{stats.finish}); experts: {stats.hits} hits, {stats.misses} misses ({stats.hit_rate:.1%} hit), "
        f"{show_size(stats.bytes_read)} read, {stats.stall_seconds:.2f} s waiting"
    )


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(line, err=True)
