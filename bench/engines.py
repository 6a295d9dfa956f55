"""One engine over a text, in a process of its own; `outofcore` starts it inside a memory cgroup.

Every engine is a generator that opens its model, yields once, and then yields the logits after each
of the ids, which it reads one at a time. `run` times it from outside, so that all are timed alike.
Settings:

* smoe: `limit` is what is stated for the process;
* llama.cpp: mapped file, no locking, no repacked copy of the weights (`use_extra_bufts`), batches
  of one token;
* transformers: bfloat16; under a limit everything is left to accelerate's disk offload, which holds
  least.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Request:
    """`warm` ids are read before the clock starts, or as many as `seconds` allows; then all others,
    or as many as `seconds` allows again. `limit` is that of the cgroup in bytes, None where there
    is none; `scratch` a directory."""

    engine: str
    model: str
    ids: list[int]
    warm: int = 32
    seconds: float = 30.0
    limit: int | None = None
    context: int = 512
    threads: int = 2
    scratch: str = ""


@dataclass
class Run:
    """`nats` is the negative log-likelihood of each id after the first, as far as was read; `about`
    what an engine says of itself."""

    opened: float = 0.0
    warm: int = 0
    tokens: int = 0
    seconds: float = 0.0
    nats: list[float] = field(default_factory=list)
    about: dict = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def smoe(ask: Request, about: dict) -> Iterator[np.ndarray | None]:
    from smoe.runtime import Engine

    about["budget"] = ask.limit
    with Engine.open(
        ask.model, memory=ask.limit, context=ask.context, threads=ask.threads
    ) as engine:
        about["plan"] = engine.plan.lines()
        yield None
        for logits in engine.score(ask.ids):
            about |= {"hit_rate": engine.stats.hit_rate, "bytes_read": engine.stats.bytes_read}
            yield logits


def llama_cpp(ask: Request, about: dict) -> Iterator[np.ndarray | None]:
    import llama_cpp as api

    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, None)
    api.llama_backend_init()
    how = api.llama_model_default_params()
    how.load_mode, how.use_extra_bufts, how.n_gpu_layers = api.LLAMA_LOAD_MODE_MMAP, False, 0
    model = api.llama_model_load_from_file(ask.model.encode(), how)
    size = api.llama_context_default_params()
    size.n_ctx, size.n_batch, size.n_ubatch = ask.context, 1, 1
    size.n_threads = size.n_threads_batch = ask.threads
    context = api.llama_init_from_model(model, size)
    if not model or not context:
        raise SystemExit(f"llama.cpp cannot open {ask.model}.")
    about["version"], about["system"] = api.__version__, api.llama_print_system_info().decode()
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    yield None
    for token in ask.ids:
        batch = api.llama_batch_get_one((api.llama_token * 1)(token), 1)
        if api.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not decode a token.")
        yield np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (vocabulary,))


def transformers(ask: Request, about: dict) -> Iterator[np.ndarray | None]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(ask.threads)
    where = (
        {}
        if ask.limit is None
        else {"device_map": "auto", "max_memory": {"cpu": 0}, "offload_folder": ask.scratch}
    )
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(ask.model, dtype=torch.bfloat16, **where)
        placed = list(
            getattr(model, "hf_device_map", {}).values()
        )  # there is none where everything fits
        about["modules on disk"] = f"{placed.count('disk')} of {len(placed)}"
        past = None
        yield None
        for token in ask.ids:
            got = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = got.past_key_values
            yield got.logits[0, -1].float().numpy()


ENGINES = {"smoe": smoe, "llama.cpp": llama_cpp, "transformers": transformers}


def run(ask: Request) -> Run:
    """Read the ids with an engine and time it."""
    done, clock = Run(), time.perf_counter
    started = clock()
    stream = ENGINES[ask.engine](ask, done.about)
    next(stream)
    done.opened, started = clock() - started, clock()
    for index, logits in enumerate(stream):
        if index + 1 < len(ask.ids):
            done.nats.append(_nats(logits, ask.ids[index + 1]))
        if not done.warm:
            if index + 1 >= ask.warm or clock() - started > ask.seconds:
                done.warm, started = index + 1, clock()
            continue
        done.tokens, done.seconds = index + 1 - done.warm, clock() - started
        if done.seconds > ask.seconds:
            break
    stream.close()
    return done


def _nats(logits: np.ndarray, following: int) -> float:
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[following])


def run_request(**request: Any) -> dict[str, Any]:
    """`run` for plain values, as a process of its own is asked and answers."""
    done = run(Request(**request))
    return asdict(done) | {"rate": done.rate}
