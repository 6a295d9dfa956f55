"""What a command and the processes that it starts hold in memory together, over time."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 0.05  # seconds between two looks
FIELDS = ("RssAnon:", "RssFile:", "RssShmem:")


@dataclass
class Footprint:
    """Seconds that a command took; the peak of all resident bytes, mapped files included, of it and
    its children at one moment, `largest` of any one of them as the kernel counted it, and samples
    of (seconds, anonymous, file)."""

    seconds: float = 0.0
    peak: int = 0
    largest: int = 0
    output: str = ""
    samples: list[tuple[float, int, int]] = field(default_factory=list)


def measured(command: list[str], look: Callable[[], None] = lambda: None) -> Footprint:
    """Run `command` to its end, its errors on our own; one that fails ends us. `look` is called now
    and then meanwhile."""
    result, done = Footprint(), threading.Event()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = threading.Thread(target=_watch, args=(process.pid, result, started, done, look))
    watch.start()
    assert process.stdout is not None
    result.output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    result.seconds = time.monotonic() - started
    result.largest = usage.ru_maxrss * 1024
    result.peak = max(result.peak, result.largest)
    return result


def _watch(
    pid: int, result: Footprint, started: float, done: threading.Event, look: Callable[[], None]
) -> None:
    while not done.wait(EVERY):
        look()
        parts = [_resident(each) for each in _tree(pid)]
        anonymous, file = (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0)
        result.samples.append((time.monotonic() - started, anonymous, file))
        result.peak = max(result.peak, anonymous + file)


def _tree(pid: int) -> list[int]:
    """The process and all below it."""
    found, open_ = [], [pid]
    while open_:
        found.append(open_.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                open_ += map(int, task.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def _resident(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if "Rss" in line}
    anonymous, *file = (found.get(name, 0) for name in FIELDS)
    return anonymous, sum(file)
