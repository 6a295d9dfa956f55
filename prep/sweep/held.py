"""What a pass holds while it waits at a layer's experts: its residual, its embeddings, whatever its
model's code keeps of the size of a hidden state. All of that lies in a file meanwhile.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

PLACES = 4  # hidden states of a pass that the file has room for; what is more stays in memory


class Held(TorchFunctionMode):
    """A context that remembers all results of torch's functions in its thread that have so many
    `numbers` and are still referred to: locals of the model's code, but not weights of `model`,
    which a function may return as they are."""

    def __init__(self, model: torch.nn.Module, numbers: int) -> None:
        super().__init__()
        self._model, self._numbers = model, numbers
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self._numbers:
            self._made.append(weakref.ref(result))
        return result

    def storages(self) -> list[torch.UntypedStorage]:
        """The memory of those that have one of their own, each once; not what was let go."""
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        found: dict[int, torch.UntypedStorage] = {}
        weights = itertools.chain(self._model.parameters(), self._model.buffers())
        shared = {w.untyped_storage().data_ptr() for w in weights if not w.is_meta}
        for tensor in alive:
            storage = tensor.untyped_storage()
            own = storage.data_ptr() not in shared and storage.nbytes() == tensor.nbytes
            if own and storage.resizable():
                found[storage.data_ptr()] = storage
        return list(found.values())


class Aside:
    """A file without a name in `directory` for what passes hold: `put` lets the memory go until
    `bring` fills it again. Every pass has a place of its own."""

    def __init__(self, directory: Path, nbytes: int):
        """`nbytes` are those of one hidden state, of the largest pass; what takes more stays."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  see `close`
        self._piece = torch.empty(nbytes, dtype=torch.uint8)  # what NumPy sees is not resizable
        self._away: dict[int, list[tuple[torch.UntypedStorage, int]]] = {}

    def put(self, number: int, held: Held) -> None:
        """What pass `number` holds, while it waits."""
        away = self._away[number] = []
        fitting = [each for each in held.storages() if each.nbytes() <= len(self._piece)]
        for storage in fitting[:PLACES]:
            self._seek(number, len(away))
            self._piece[: storage.nbytes()] = _bytes(storage)
            self._all(self._file.write, storage.nbytes())
            away.append((storage, storage.nbytes()))
            storage.resize_(0)

    def bring(self, number: int) -> None:
        """Before pass `number` goes on."""
        for place, (storage, nbytes) in enumerate(self._away.pop(number, [])):
            storage.resize_(nbytes)
            self._seek(number, place)
            self._all(self._file.readinto, nbytes)
            _bytes(storage).copy_(self._piece[:nbytes])

    def close(self) -> None:
        self._away.clear()
        self._file.close()

    def _seek(self, number: int, place: int) -> None:
        self._file.seek((number * PLACES + place) * len(self._piece))

    def _all(self, move: Callable[[memoryview], int | None], nbytes: int) -> None:
        """Move so many, however few go at once."""
        left = self._piece.numpy().data[:nbytes]
        while left:
            moved = move(left)
            if not moved:
                raise OSError("the file for what passes hold became shorter; start the build again")
            left = left[moved:]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
