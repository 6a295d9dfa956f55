"""A bundle's experts without its backbone: for who runs the rest of a model in another way, as prep
does while a model writes its own text."""

from __future__ import annotations

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import checked_level, encoding_named
from smoe.runtime import kernels
from smoe.runtime.cache.cache import STREAMS, ExpertCache
from smoe.runtime.cache.eviction import DEFAULT_EVICTION, eviction_named
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.residency import Residency
from smoe.runtime.cache.storage import Shards
from smoe.runtime.experts import LocalExperts
from smoe.runtime.routing import Assignment, Dispatch, combine
from smoe.runtime.stats import Stats


class ExpertsAlone:
    """The experts of the shards of `bundle`, of whose manifest the layers' geometry and `experts`
    are looked at and nothing else. Use it in a `with`.

    Records up to `level` (None: whole) of no more than `memory` bytes stay, though of `STREAMS`
    experts at least; what does not stay is read again, and no bit depends on that. A level that
    the encoding lacks is a `BundleError`."""

    def __init__(self, bundle: Bundle, memory: int, level: int | None = None):
        manifest, layouts = bundle.manifest, bundle.layouts
        counts = [layer.experts for layer in manifest.layers]
        level = checked_level(encoding_named(manifest.experts.encoding), level)
        record = max(layout.levels[level - 1] for layout in layouts)
        frames = min(sum(counts), max(STREAMS, memory // record))
        self._shards = Shards(bundle, level, "buffered" if frames == sum(counts) else "direct")
        residency = Residency(
            counts,
            frames * record,
            eviction_named(DEFAULT_EVICTION, counts),
            [np.full(level, record)] * len(layouts),
        )
        rows = Frames(frames, record)
        most = max(layer.top_k for layer in manifest.layers)
        self._cache = ExpertCache(residency, rows, self._shards.read, most, Stats())
        layers = kernels.choose().layers(manifest, layouts)
        self._experts = LocalExperts(self._cache, layers, self._shards.level)

    def __enter__(self) -> ExpertsAlone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let all of it go."""
        self._experts.close()
        self._shards.close()
        self._cache.release()

    def __call__(
        self, layer: int, hidden: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """What the experts of `layer` add, float32 `[T, H]`, to tokens that they receive as
        `hidden` float32 `[T, H]`, with ids int64 (the number of experts: none) and mixing weights
        float32 `[T, k]`. A read that fails is an `EngineError`."""
        available = self._experts.available(layer)
        dispatch = Dispatch.of(Assignment(ids=ids, weights=weights), available)
        self._cache.observe(layer, ids, None)
        outputs = np.zeros((*ids.shape, hidden.shape[1]), np.float32)
        self._experts.start(layer, dispatch, hidden, outputs).wait()
        return combine(outputs, weights)
