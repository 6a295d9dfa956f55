"""The executor of programs (`artifacts.program`): segments of a backbone without ONNX Runtime.

`open_program` gives an `Executable`: the native one, or its NumPy twin where the kernels are the
reference. Both give the same bits, and a token's bits depend on its own past alone: not on what
else is in the step, where a prompt is cut, the threads or the instructions.
"""

from __future__ import annotations

from smoe.runtime.program.executable import open_program
from smoe.runtime.program.seam import Executable, LayerExperts, Rows
from smoe.runtime.program.state import ProgramState

__all__ = ["Executable", "LayerExperts", "ProgramState", "Rows", "open_program"]
