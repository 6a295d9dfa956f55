"""The commands of `smoe`: run, chat, serve, bench, info, verify. Text on stdout; mode lines and
statistics on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from smoe.artifacts import Bundle, open_bundle
from smoe.artifacts.licence import Licence
from smoe.runtime import allowance
from smoe.runtime.budget import MemoryPlan, memory_for, plan_memory
from smoe.runtime.cli_chat import chat
from smoe.runtime.cli_options import (
    NEW_TOKENS,
    engine_options,
    generation_options,
    json_option,
    open_engine,
    open_exact_twin,
    refuse_generation,
    session_option,
)
from smoe.runtime.cli_output import say, show
from smoe.runtime.cli_serve import serve
from smoe.runtime.device_profile import measure_device
from smoe.runtime.errors import EngineError
from smoe.runtime.evaluate import bench as run_bench
from smoe.runtime.evaluate import bench_lines
from smoe.runtime.execution import divide
from smoe.runtime.hub import located
from smoe.runtime.serve.measure import bench_requests
from smoe.runtime.session import kept
from smoe.runtime.sizes import show_size
from smoe.runtime.text import StopWhen, Text
from smoe.runtime.trace import PLAIN, Trace, traced

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=HELP)
@click.version_option(package_name="smoe")
def cli() -> None:
    """Run a prepared mixture-of-experts model inside a memory budget.

    BUNDLE is the directory that smoe-prep wrote, or the name ORG/NAME[@REVISION] of one to
    fetch."""


@cli.command()
@engine_options
@click.argument("prompt")
@generation_options
@click.option(
    "--ids", is_flag=True, help="PROMPT is token ids, separated by spaces; so is the answer."
)
@session_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    ids: bool,
    session: Path | None,
    as_json: bool,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Generate from PROMPT ("-" reads it from stdin). BUNDLE is a directory, or the name
    ORG/NAME[@REVISION] of one to fetch, with the extra smoe[hub]."""
    refuse_generation(options)
    options["max_new_tokens"] = options["max_new_tokens"] or NEW_TOKENS
    text = sys.stdin.read() if prompt == "-" else prompt
    reuse = session is not None  # of what it holds, as much as the prompt begins with
    with open_engine(located(bundle), options) as engine, kept(engine, session) as resumed:
        say(*engine.mode_lines(), *filter(None, [resumed]))
        asked = _parse_ids(text) if ids else text
        tokens = []
        try:
            for token in engine.generate(asked, stop=StopWhen(stop), reuse=reuse, **options):
                tokens.append(token)
                if not as_json:
                    show(f"{token.id} " if ids else token.text, end="")
        except KeyboardInterrupt:
            say("", "cancelled")
        if as_json:
            made = {
                "text": "".join(token.text for token in tokens),
                "ids": [token.id for token in tokens],
                "stats": engine.stats.as_dict(),
                "memory": _plan(engine.plan),
            }
            show(json.dumps(made))
        else:
            show("")
            say(engine.stats.line())


@cli.command()
@engine_options
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
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    help="Ask all rows at once, of which N advance together, and draw what is not a row's prompt.",
)
@click.option(
    "--held",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="With --requests: tokens that these hold together. Default: N times --context.",
)
@click.option(
    "--machine",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Measure this machine's reads, kernels and backbone instead, and write FILE for smoe-prep "
    "plan.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what it did and when, reads, waits, kernels and segments, into FILE, for "
    "chrome://tracing or ui.perfetto.dev.",
)
@json_option
def bench(
    bundle: Path,
    text: Path | None,
    tokens: int,
    length: int,
    prompt: int,
    choices: int,
    requests: int | None,
    held: int | None,
    machine: Path | None,
    trace: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure speed, hits, memory and quality on a text, teacher-forced; a lossy run is compared
    with the exact one."""
    if (text is None) == (machine is None):
        raise click.UsageError(
            "Give either --text, to measure a run, or --machine, to measure the machine."
        )
    if machine is not None:
        given = {"bundle", "machine", "io", "as_json"}
        others = {name for p in click.get_current_context().command.params if (name := p.name)}
        _refuse(others - given, "--machine, which measures the machine and no policy")
        device = measure_device(located(bundle), options["io"])
        _write(machine, device.to_json())
        show(device.to_json().rstrip() if as_json else f"{machine}: written")
        return
    assert text is not None
    bundle = located(bundle)
    with contextlib.ExitStack() as stack:
        makers = PLAIN if trace is None else traced(stack.enter_context(Trace(trace)))
        if requests is not None:
            asked = options | {"requests": requests, "held": held}
            _refuse(["choices"], "--requests, which asks no questions")
            measured = bench_requests(
                lambda: open_engine(bundle, asked, makers), text, tokens, length, prompt, say
            )
        else:
            _refuse(["held"], "one request at a time")
            _refuse(["draft"], "a text that is given, token by token; --requests draws one")
            measured = run_bench(
                lambda: open_engine(bundle, dict(options), makers),
                lambda: open_exact_twin(bundle, dict(options), say),
                text,
                tokens,
                length,
                prompt,
                choices,
                say,
            )
    show(json.dumps(measured) if as_json else "\n".join(bench_lines(measured)))


def _refuse(names: Container[str], where: str) -> None:
    """An option of these `names` that was given and has no effect is an error."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} has no effect with {where}; leave it out.")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise EngineError(f"{file} cannot be written: {error.strerror}.") from error


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--context", type=int, metavar="TOKENS", help="Longest sequence, for the memory figures."
)
@json_option
def info(bundle: Path, context: int | None, as_json: bool) -> None:
    """Say what a bundle holds, and how much memory it needs."""
    description = _about(located(bundle), context)
    if as_json:
        show(json.dumps(description))
        return
    provenance = description.pop("provenance")
    for name, value in [*description.items(), *provenance.items()]:
        sized = isinstance(value, int) and (name.startswith("memory") or name.endswith("bytes"))
        show(f"{name.replace('_', ' '):24} {show_size(value) if sized else value}")


def _about(bundle: Path, context: int | None) -> dict[str, Any]:
    opened = open_bundle(bundle)
    manifest = opened.manifest
    division = divide(manifest, opened.program)
    onnx, (kept, windowed) = division.onnx, division.token_state()
    alone, layers = plan_memory(opened, None, context), manifest.layers
    held = allowance.process(alone)
    full = plan_memory(opened, None, context, process=held)
    refusals = [layer.routing_refusal for layer in layers if layer.routing is None]
    return {
        "model": manifest.model.model_type,
        "architecture": manifest.model.architecture,
        "moe_layers": len(layers),
        "experts": sum(layer.experts for layer in layers),
        "experts_per_token": full.token_cycle,
        "encoding": manifest.experts.encoding,
        "record_bytes": full.record,
        "backbone": manifest.backbone.precision,
        "program": f"{len(onnx) - sum(onnx)} of {len(onnx)} segments" if opened.program else "none",
        "vocabulary": manifest.model.vocabulary,
        "end_tokens": _ends(opened),
        "longest_context": manifest.model.context,
        "longest_context_reason": manifest.provenance.get("context", "the model's config says so"),
        "state": division.kind if division.program and division.program.states else "as graphs say",
        "state_bytes_per_token": kept,
        "state_bytes_per_token_in_windows": windowed,
        "bytes": sum(file.size for file in manifest.files.values()),
        "context": full.context,
        "memory_process": held,
        "memory_state": full.state,
        "memory_minimum": full.minimum,
        "memory_one_token_cycle": memory_for(opened, full.token_cycle, context, process=held),
        "memory_all_resident": max(full.total, full.minimum),
        "substitution": refusals[0] if refusals else "possible",
        **Licence.of(manifest).as_dict(bundle),
        "provenance": manifest.provenance,
    }


def _ends(bundle: Bundle) -> str:
    """The tokens that end a generation, with their text."""
    tokenizer = Text(bundle.path, bundle.manifest.files).tokenizer
    ends = [
        f"{i} {tokenizer.id_to_token(i)}" if tokenizer else str(i)
        for i in bundle.manifest.model.end_ids
    ]
    return ", ".join(ends) or "none: a generation runs to its limit, unless --stop ends it"


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file of a bundle against its manifest: sizes, layout and SHA-256. Integrity, not
    origin."""
    bundle = located(bundle)
    manifest = open_bundle(bundle, hashes=True).manifest
    size = sum(file.size for file in manifest.files.values())
    checked = {"ok": True, "files": len(manifest.files), "bytes": size}
    line = f"{bundle}: {len(manifest.files)} files, {show_size(size)}, all as the manifest says"
    show(json.dumps(checked) if as_json else line)


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
        "process": plan.process,
        "backbone": plan.backbone,
        "state": plan.state,
        "workspace": plan.workspace,
        "record": plan.record,
        "resident_experts": plan.capacity,
        "experts": plan.experts,
    }


cli.add_command(chat)
cli.add_command(serve)
