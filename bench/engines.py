"""One engine over a text, in a process of its own; `outofcore` starts it inside a memory cgroup.

Every engine is a generator that opens its model, yields once, and then yields the logits after the
prompt and after each of the other ids, which it reads one at a time. `run` times it from outside,
so that all are timed alike. Settings:

* smoe: `limit` is what is stated for the process;
* llama.cpp: mapped file, no locking, no repacked copy of the weights (`use_extra_bufts`), batches
  of one token, or of 512 where there is a prompt;
* transformers: bfloat16; under a limit everything is left to accelerate's disk offload, which holds
  least.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512  # tokens of a prompt that llama.cpp reads at once


@dataclass(frozen=True)
class Request:
    """The first `prompt` ids are read at once, and timed by themselves. `warm` ids are read before
    the clock starts, or as many as `seconds` allows; then all others, or as many as `seconds`
    allows again. `limit` is that of the cgroup in bytes, None where there is none; `scratch` a
    directory."""

    engine: str
    model: str
    ids: list[int]
    warm: int = 32
    seconds: float = 30.0
    limit: int | None = None
    context: int = 512
    threads: int = 2
    scratch: str = ""
    prompt: int = 1


@dataclass
class Run:
    """`prompt` are the seconds until the first logits, `bytes` what was read from the disk while
    the clock ran (None: this system does not say), `nats` the negative log-likelihood of each id
    after the prompt, as far as was read; `about` what an engine says of itself."""

    opened: float = 0.0
    prompt: float = 0.0
    bytes: int | None = None
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
        for logits in engine.score(ask.ids, prompt=ask.prompt):
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
    together = 1 if ask.prompt == 1 else BATCH
    size.n_ctx, size.n_batch, size.n_ubatch = ask.context, together, together
    size.n_threads = size.n_threads_batch = ask.threads
    context = api.llama_init_from_model(model, size)
    if not model or not context:
        raise SystemExit(f"llama.cpp cannot open {ask.model}.")
    about["version"], about["system"] = api.__version__, api.llama_print_system_info().decode()
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    yield None
    for part in _pieces(ask):
        for low in range(0, len(part), together):
            ids = part[low : low + together]
            tokens = (api.llama_token * len(ids))(*ids)  # which the batch does not keep
            if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
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
        for part in _pieces(ask):
            got = model(input_ids=torch.tensor([part]), past_key_values=past, use_cache=True)
            past = got.past_key_values
            yield got.logits[0, -1].float().numpy()


ENGINES = {"smoe": smoe, "llama.cpp": llama_cpp, "transformers": transformers}


def _pieces(ask: Request) -> Iterator[list[int]]:
    """What is read at once: the prompt, then one id after another."""
    yield ask.ids[: ask.prompt]
    yield from ([token] for token in ask.ids[ask.prompt :])


def run(ask: Request) -> Run:
    """Read the ids with an engine and time it."""
    done, clock, before = Run(), time.perf_counter, None
    started = clock()
    stream = ENGINES[ask.engine](ask, done.about)
    next(stream)
    done.opened, started = clock() - started, clock()
    for read, logits in enumerate(stream, ask.prompt):
        if read < len(ask.ids):
            done.nats.append(_nats(logits, ask.ids[read]))
        if read == ask.prompt:
            done.prompt = clock() - started
            started = started if ask.prompt == 1 else clock()
        if not done.warm:
            if read - ask.prompt + 1 >= ask.warm or clock() - started > ask.seconds:
                done.warm, started, before = read, clock(), _from_disk()
            continue
        done.tokens, done.seconds = read - done.warm, clock() - started
        if done.seconds > ask.seconds:
            break
    after = _from_disk()
    done.bytes = None if after is None or before is None else after - before
    stream.close()
    return done


def _from_disk() -> int | None:
    """Bytes that this process had to have read from a disk so far, mapped pages included."""
    file = Path("/proc/self/io")
    if not file.exists():
        return None
    counts = dict(line.split(": ") for line in file.read_text().splitlines())
    return int(counts["read_bytes"])


def _nats(logits: np.ndarray, following: int) -> float:
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[following])


def run_request(**request: Any) -> dict[str, Any]:
    """`run` for plain values, as a process of its own is asked and answers."""
    done = run(Request(**request))
    return asdict(done) | {"rate": done.rate}
