"""What routers of levels are trained for: a price of a bit, and what slots cost beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smoe.artifacts import Bundle
from smoe.prep.errors import PrepError
from smoe.runtime.bits import scale_of
from smoe.runtime.choose.bits import LevelNats, PricedLevels, Scale
from smoe.runtime.choose.prices import KINDS, usual_weights

TABLES = ("counts", "gate_mass", "price_level", "price_fit")


@dataclass(frozen=True)
class Goal:
    """`price` is the logarithm of the nats that a bit of a usual slot may cost, the one at which
    levels by prices have `average` bits; `spread` how far drawn prices go from it. `scale` says
    what levels are, `fit` what makes nats of p. `biases` `[E, J]` of every layer are logits that
    choose by experts alone, by their prices at their `usual` weights `[E]`."""

    average: float
    price: float
    spread: float
    scale: Scale
    fit: tuple[float, float]
    biases: list[np.ndarray]
    usual: list[np.ndarray]

    @classmethod
    def of(cls, bundle: Bundle, average: float | None, spread: float) -> Goal:
        """That of a bundle with prices, for an `average` (None: the middle of what there is)."""
        scale = scale_of(bundle.manifest, bundle.levels)
        least, most = scale.bits[[0, -1]].tolist()
        average = (least + most) / 2 if average is None else average
        if not least < average < most:
            raise PrepError(f"--average is {average}; it goes from {least:g} to {most:g} bits.")
        layers = bundle.tables.layers(*TABLES)
        if not all(len(layer) == len(TABLES) for layer in layers):
            raise PrepError(
                f"{bundle.path} has no prices of levels, by which routers of levels are trained; "
                "build it again from --calibration text without --prices 0."
            )
        nats = [LevelNats(a["price_level"], a["price_fit"], bundle.levels) for a in layers]
        usual = [usual_weights(layer["counts"], layer["gate_mass"]) for layer in layers]
        uses = [(layer["counts"], w) for layer, w in zip(layers, usual, strict=True)]
        price = PricedLevels(nats, scale).price_of(average, uses)
        biases = [
            _biases(layer_nats(np.arange(len(w)), w), price, scale.bits * weight)
            for layer_nats, w, weight in zip(nats, usual, scale.weight, strict=True)
        ]
        linear, root = layers[0]["price_fit"][KINDS.index("level")].tolist()
        return cls(average, price, spread, scale, (linear, root), biases, usual)

    @property
    def bits(self) -> torch.Tensor:
        """float32 `[J]`."""
        return torch.from_numpy(self.scale.bits.astype(np.float32))

    def nats(self, moments: torch.Tensor) -> torch.Tensor:
        """Of p."""
        return self.fit[0] * moments + self.fit[1] * moments.sqrt()

    def drawn(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Prices on the logits' scale, float32 `[count]`: logarithms of what a bit costs beside
        `price`."""
        return (2 * torch.rand(count, generator=generator) - 1) * self.spread

    def priced(self, logits: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        """Logits `[.., J]` at `prices` `[..]`."""
        return logits - prices[..., None] * self.bits.to(logits.device)

    def costs(self, layer: int, nats: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        """Nats `[.., J]` and bits at `prices` `[..]`, in bits of a usual slot at the middle price.
        Dear and cheap prices count alike: between both units, nats and bits."""
        bits = self.bits.to(nats.device) * float(self.scale.weight[layer])
        half = (prices / 2).exp()[..., None]
        return nats * (float(np.exp(-self.price)) / half) + bits * half


def _biases(nats: np.ndarray, price: float, bits: np.ndarray) -> np.ndarray:
    """Logits `[E, J]` for `nats` `[E, J]`: every plane adds the logarithm of what it saves per bit,
    beside the price, for each of its bits."""
    planes = np.diff(bits)
    saved = np.maximum(nats[:, :-1] - nats[:, 1:], 1e-12) / planes
    steps = (np.log(saved) - price) * planes
    return np.concatenate([np.zeros((len(nats), 1)), np.cumsum(steps, 1)], 1)
