"""What an engine does and when, as a Chrome trace: for chrome://tracing or ui.perfetto.dev.

`traced` makes the parts of an engine so that they note what they do: segments, kernels, reads and
waits. An engine without a trace is made of the plain ones, and pays nothing. Events go to the file
as they end; none is kept. Since kernels are wrapped, a traced run goes from layer to layer in
Python, even where nothing is missing.

Source of the format: "Trace Event Format" (Google, 2016), complete events (X) and metadata (M)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from smoe.runtime.backbone import Backbone, Flow
from smoe.runtime.cache.reader import Load, Reader
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import LayerKernel, Work
from smoe.runtime.model import Model, Run
from smoe.runtime.routing import Routed
from smoe.runtime.step import Parts, Step

T = TypeVar("T")


@dataclass(frozen=True)
class Makers:
    """What the parts of an engine are made by."""

    backbone: Callable[..., Backbone] = Backbone
    reader: Callable[..., Reader] = Reader
    kernels: Callable[[list[LayerKernel]], list[LayerKernel]] = list
    model: Callable[..., Model] = Model


PLAIN = Makers()


class Trace:
    """Events into `file`, which is written anew; from any thread. Times are in microseconds since
    it was opened. An `EngineError` says at once that the file cannot be written, and at the end
    that not all of it could."""

    def __init__(self, file: Path):
        self._file, self._lock = file, threading.Lock()
        self._started, self._process = time.perf_counter_ns(), os.getpid()
        self._threads: set[int] = set()
        self._failed: OSError | None = None
        try:
            self._out = open(file, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._refusal(error) from error
        self._write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        self._write(self._event("process_name", "M", args={"name": "smoe"}))

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._write("\n]}\n")
            try:
                self._out.close()
            except OSError as failure:
                self._failed = self._failed or failure
        if self._failed is not None and kind is None:
            raise self._refusal(self._failed)

    @contextlib.contextmanager
    def span(self, name: str, **about: Any) -> Iterator[dict[str, Any]]:
        """An event as long as the `with` lasts; what is put into the value it gives is shown beside
        `about`."""
        started = time.perf_counter_ns()
        try:
            yield about
        finally:
            self._add(name, started, time.perf_counter_ns(), about)

    def _add(self, name: str, started: int, ended: int, about: dict[str, Any]) -> None:
        times = {"ts": (started - self._started) / 1e3, "dur": (ended - started) / 1e3}
        event = self._event(name, "X", **times, args=about)
        with self._lock:
            thread = threading.get_native_id()
            if thread not in self._threads:
                self._threads.add(thread)
                called = {"name": threading.current_thread().name}
                self._write(",\n" + self._event("thread_name", "M", args=called))
            self._write(",\n" + event)

    def _event(self, name: str, phase: str, **fields: Any) -> str:
        whose = {"pid": self._process, "tid": threading.get_native_id()}
        return json.dumps({"name": name, "ph": phase, **whose, **fields})

    def _write(self, text: str) -> None:
        """Threads that read must not fail for want of room for a trace: that is said at the end."""
        if self._failed is None:
            try:
                self._out.write(text)
            except OSError as error:
                self._failed = error

    def _refusal(self, error: OSError) -> EngineError:
        return EngineError(
            f"{self._file} cannot be written: {error.strerror}; name a file where there is room, "
            "or leave out the trace."
        )


def traced(trace: Trace) -> Makers:
    """Parts that note what they do in `trace`."""
    return Makers(
        backbone=partial(_Backbone, trace),
        reader=partial(_Reader, trace),
        kernels=lambda layers: [_Kernel(trace, n, kernel) for n, kernel in enumerate(layers)],
        model=partial(_Model, trace),
    )


@dataclass(frozen=True)
class _Kernel:
    trace: Trace
    layer: int
    kernel: LayerKernel

    def __call__(self, records: np.ndarray, work: Work, x: np.ndarray) -> np.ndarray:
        about = {"layer": self.layer, "experts": len(work.frames), "slots": len(work.tokens)}
        with self.trace.span("kernel", **about):
            return self.kernel(records, work, x)


class _Reader(Reader):
    def __init__(self, trace: Trace, *arguments: Any):
        self._trace = trace  # before threads begin
        super().__init__(*arguments)

    def finish(self, load: Load) -> None:
        layer, expert = load.key
        with self._trace.span("read", layer=layer, expert=expert, guess=load.guess) as about:
            super().finish(load)
            about |= {"planes": [load.since, max(load.since, load.level)], "bytes": load.nbytes}

    def wait(self, loads: Iterable[Load]) -> bool:
        loads = list(loads)
        with self._trace.span("wait", loads=len(loads)):
            return super().wait(loads)


class _Backbone(Backbone):
    def __init__(self, trace: Trace, *arguments: Any):
        self._trace = trace
        super().__init__(*arguments)

    def routing(self, layer: int, flow: Flow) -> Parts[Routed]:
        about = {"layer": layer, "tokens": flow.step.tokens}
        return _noted(self._trace, "segment", super().routing(layer, flow), **about)

    def peek(self, layer: int, flow: Flow, mixed: np.ndarray) -> Routed:
        with self._trace.span("look ahead", layer=layer):
            return super().peek(layer, flow, mixed)

    def finish(self, flow: Flow) -> list[np.ndarray]:
        with self._trace.span("last segment", tokens=flow.step.tokens):
            return super().finish(flow)


class _Model(Model):
    def __init__(self, trace: Trace, **parts: Any):
        self._trace = trace
        super().__init__(**parts)

    def step(self, step: Step) -> list[np.ndarray]:
        with self._trace.span("step", tokens=step.tokens, sequences=len(step.spans)):
            return super().step(step)

    def run(self, step: Step) -> Run:
        return _noted(self._trace, "part", super().run(step))


def _noted(trace: Trace, name: str, parts: Parts[T], **about: Any) -> Parts[T]:
    """Each of `parts` by itself: other steps may run between two of them."""
    with contextlib.closing(parts):
        while True:
            with trace.span(name, **about):
                try:
                    next(parts)
                except StopIteration as end:
                    return end.value
            yield
