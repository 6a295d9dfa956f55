"""Ways to bring records into memory, side by side:  python bench/reads.py BUNDLE [--rounds N]

Every way reads the same records of the bundle in the same random order, from the device: their pages are dropped from the page
cache before. Reads go into memory that the process owns; mapped ways touch every page, as a kernel would. Medians of
interleaved rounds; `cpu` is processor time per second of wall clock, `of best` the rate relative to the fastest way.
"""

import argparse
import mmap
import os
import statistics
import threading
import time
from itertools import count
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle
from smoe.runtime.cache.storage import Shards
from smoe.runtime.system import aligned

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; not yet in mmap


def owned(shards: Shards, wanted: list[tuple[int, int]], frames: np.ndarray, threads: int) -> None:
    """As the engine reads: threads that take the next record."""
    following = count()

    def work() -> None:
        while (i := next(following)) < len(wanted):
            shards.read(*wanted[i], frames[i % len(frames)])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def mapped(shards: Shards, wanted: list[tuple[int, int]], advice: int | None) -> None:
    """A mapping of every shard, told `advice` for a record, of which every page is then touched."""
    maps = []
    for path, file, _ in shards._files:
        maps.append(mmap.mmap(file, os.stat(path).st_size, prot=mmap.PROT_READ))
    for layer, expert in wanted:
        _, _, start = shards._files[layer]
        size = shards.layouts[layer].levels[shards.level - 1]
        at = start + expert * shards.layouts[layer].nbytes
        if advice is not None:
            maps[layer].madvise(advice, at, size)
        np.frombuffer(maps[layer], np.uint8, size, at)[:: mmap.PAGESIZE].sum()


WAYS = {
    **{
        f"{io}, {n} thread{'s' * (n > 1)}": (io, n)
        for io in ("buffered", "direct")
        for n in (1, 2, 4)
    },
    "mapped, touched": ("mapped", None),
    "mapped, WILLNEED": ("mapped", mmap.MADV_WILLNEED),
    "mapped, POPULATE_READ": ("mapped", POPULATE_READ),
    "mapped, RANDOM": ("mapped", mmap.MADV_RANDOM),
}


def main(bundle: Path, megabytes: int, rounds: int) -> None:
    manifest = open_bundle(bundle).manifest
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    random = np.random.default_rng(0)
    every = [(layer, e) for layer, spec in enumerate(manifest.layers) for e in range(spec.experts)]
    for _ in range(rounds):
        for name, (io, how) in WAYS.items():
            shards = Shards(bundle, manifest, io="direct" if io == "direct" else "buffered")
            record = shards.layouts[0].levels[-1]
            wanted = [
                every[i]
                for i in random.permutation(len(every))[: max(4, megabytes * 10**6 // record)]
            ]
            frames = aligned(8, record)
            frames[:] = 0
            for key in wanted:
                shards.forget(*key)
            started, cpu = time.perf_counter(), time.process_time()
            if io == "mapped":
                mapped(shards, wanted, how)
            else:
                owned(shards, wanted, frames, how)
            seconds = time.perf_counter() - started
            found[name].append(
                (len(wanted) * record / seconds / 1e9, (time.process_time() - cpu) / seconds)
            )
            shards.close()
    rates = {name: statistics.median(rate for rate, _ in runs) for name, runs in found.items()}
    print(f"{record / 1e6:.1f} MB a record, {len(wanted)} records a round, {rounds} rounds")
    print(f"{'way':24} {'GB/s':>6} {'of best':>8} {'cpu':>6}")
    for name, rate in rates.items():
        cpu = statistics.median(cpu for _, cpu in found[name])
        print(f"{name:24} {rate:6.2f} {rate / max(rates.values()):8.2f} {cpu:6.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    main(asked.bundle, asked.megabytes, asked.rounds)
