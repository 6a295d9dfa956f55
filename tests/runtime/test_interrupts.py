"""Ctrl-C anywhere: at every so-many-th line that the engine runs, no frame is lost and the next
answer is the same."""

import linecache
import random
import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from support.parts import accounted, greedy, make_parts

import smoe.runtime
from smoe.artifacts import open_bundle
from smoe.runtime.options import make_predictor

ROOT = Path(smoe.runtime.__file__).parent
PLACES = (
    *(file for room in ("cache", "backbone") for file in sorted((ROOT / room).glob("*.py"))),
    *(ROOT / name for name in ("experts.py", "model.py")),
)
FILES = {str(path) for path in PLACES} | {str(path.resolve()) for path in PLACES}


def _leaves_with(frame: FrameType) -> bool:
    """Whether this line event is a `with` statement's second one, after its body."""
    code, line = frame.f_code, frame.f_lineno
    if not linecache.getline(code.co_filename, line).strip().startswith("with "):
        return False
    return frame.f_lasti > min(start for start, _, number in code.co_lines() if number == line)


class Lines:
    """Counts the lines of `FILES` that this thread runs, and raises KeyboardInterrupt at the one of
    number `at`.

    The way out of a `with` is a line event too; a lock is left there without a moment for Ctrl-C,
    so those do not count.
    """

    def __init__(self, at: int | None = None):
        self.at, self.count = at, 0

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: object):
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame: FrameType, event: str, argument: object):
        if event == "line" and not _leaves_with(frame):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._line


PROMPT = np.arange(3, 12)


@pytest.mark.parametrize("prefetch", ["none", "previous"])
@pytest.mark.parametrize("version", [0, 1, 2, None])
def test_an_interrupt_at_any_line_loses_no_frame(goldens, programmed, version, prefetch):
    """None: a bundle that needs no ONNX Runtime."""
    path = programmed if version is None else goldens[version]
    bundle = open_bundle(path)
    with make_parts(path, experts=14) as parts:
        wanted = greedy(parts, PROMPT, 3)
    predict = make_predictor(prefetch, bundle.manifest, bundle.tables)
    chance = random.Random(version or 7)
    with make_parts(path, experts=3, predict=predict) as parts:
        with Lines() as lines:
            assert greedy(parts, PROMPT, 3) == wanted
        assert lines.count > 500
        for _ in range(25):
            sequence = parts.sequence()
            with pytest.raises(KeyboardInterrupt), Lines(chance.randrange(1, lines.count // 2)):
                greedy(parts, PROMPT, 3, sequence)
            # What was consumed was consumed whole: the rest of the prompt goes on from there.
            assert sequence.length in (0, *range(len(PROMPT), len(PROMPT) + 3))
            if not sequence.length:
                assert greedy(parts, PROMPT, 3, sequence) == wanted
            assert greedy(parts, PROMPT, 3) == wanted
    assert accounted(parts.residency, parts.sizes) and len(parts.residency) == 3
