"""The backbone as a program: ONNX segments compiled into a table of operations and packed weights
(artifacts/program.py), which the device runs without ONNX Runtime. Patterns of operations, no model
families."""

from smoe.prep.program.compile import compile

__all__ = ["compile"]
