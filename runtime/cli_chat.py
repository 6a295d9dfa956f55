"""`smoe chat`: a conversation in the terminal, or over pipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from smoe.runtime.allowance import longest_context
from smoe.runtime.cli_options import (
    engine_options,
    generation_options,
    json_option,
    open_engine,
    refuse_generation,
    session_option,
)
from smoe.runtime.cli_output import say, show
from smoe.runtime.conversation import Conversation, Message
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Token
from smoe.runtime.hub import located
from smoe.runtime.session import kept
from smoe.runtime.text import StopWhen, read_text


@click.command()
@engine_options
@generation_options
@click.option("--system", help="What the model is told before the first turn.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A Jinja template in place of the bundle's.",
)
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    help="Variables of the template, and tools or documents, like '{\"enable_thinking\": false}'.",
)
@click.option(
    "--overflow",
    type=click.Choice(["drop", "end"]),
    default="drop",
    show_default=True,
    help="What a conversation longer than the context does: drop its oldest turns, or end.",
)
@session_option
@json_option
def chat(
    bundle: Path,
    system: str | None,
    chat_template: Path | None,
    chat_template_kwargs: str | None,
    overflow: str,
    session: Path | None,
    as_json: bool,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Talk, a line a turn; an empty line or end of input ends it. Ctrl-C cuts an answer short."""
    refuse_generation(options)
    template = read_text(chat_template) if chat_template else None
    variables = _variables(chat_template_kwargs or "{}")
    most = options.pop("max_new_tokens")
    conversation = Conversation(system)
    with (
        open_engine(located(bundle), options) as engine,
        kept(engine, session, conversation) as resumed,
    ):

        def encode(messages: list[Message]) -> list[int]:
            return engine.text.chat(messages, template, **variables)

        encode(conversation.messages("?"))  # no template: say so now
        say(*engine.mode_lines(), *filter(None, [resumed]))
        room = engine.context - (most or engine.context // 2)
        while line := _ask():
            try:
                ids, dropped = conversation.fitting(line, encode, room)
                if dropped:
                    say(_overflow(engine, dropped, overflow))
                    if overflow == "end":
                        break
                options["max_new_tokens"] = most or max(1, engine.context - len(ids))
                tokens = _answer(engine, ids, stop, options, not as_json)
                answer = engine.text.answer([token.id for token in tokens], template, stop)
            except EngineError as error:  # the conversation so far is kept
                say(f"smoe: {error}")
                continue
            conversation.answered(line, answer, dropped)
            text = "".join(token.text for token in tokens)
            made = {"text": text, "stats": engine.stats.as_dict()}
            show(json.dumps(made) if as_json else "")
            if engine.stats.finish == "length" and not as_json:
                say(f"smoe: cut at {len(tokens)} tokens; --max-new-tokens has room for more.")
        if not as_json:
            say(engine.stats.line())


def _variables(text: str) -> dict[str, Any]:
    """What --chat-template-kwargs gives `Text.chat`."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--chat-template-kwargs is not JSON: {error}.") from error
    if not isinstance(given, dict) or {"messages", "template"} & given.keys():
        raise click.UsageError(
            "--chat-template-kwargs is a JSON object of the template's variables, without messages "
            "and template."
        )
    return given


def _overflow(engine: Engine, dropped: int, overflow: str) -> str:
    """What happens to a conversation that is too long, and what can be done."""
    longer = f"this conversation is longer than the context of {engine.context} tokens"
    if overflow == "end":
        done = "and ends here; --overflow drop goes on without its oldest turns"
    else:
        done = f"its {f'{dropped} oldest turns are' if dropped > 1 else 'oldest turn is'} dropped"
    return f"smoe: {longer}{' ' if overflow == 'end' else ': '}{done}; {_more_room(engine)}."


def _more_room(engine: Engine) -> str:
    """What a longer context would be, where model and memory allow one."""
    longest, context = engine.manifest.model.context, engine.context
    if context >= longest:
        return "this model takes no longer ones"
    able = longest_context(engine.bundle, engine.plan, engine.level, engine.division.execution)
    if able <= context:
        return f"this model takes up to {longest}, for which --memory is too little"
    much = f"memory is there for {able}, " if able < longest else ""
    return (
        f"--context {min(2 * context, able)} has room for more ({much}this model takes up to "
        f"{longest})"
    )


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _answer(
    engine: Engine, ids: list[int], stop: tuple[str, ...], generation: dict[str, Any], show_it: bool
) -> list[Token]:
    """The tokens of an answer, shown as they come. Where a special token that is not shown stands
    between parts, such as thoughts and what follows them, a line ends."""
    tokens: list[Token] = []
    last, apart = "\n", False
    try:
        for token in engine.generate(ids, stop=StopWhen(stop), reuse=True, **generation):
            tokens.append(token)
            if not token.text:
                apart = apart or engine.text.is_special(token.id)
            elif show_it:
                show(("\n" if apart and last != "\n" else "") + token.text, end="")
                last, apart = token.text[-1], False
    except KeyboardInterrupt:
        say("", "cancelled")
    return tokens
