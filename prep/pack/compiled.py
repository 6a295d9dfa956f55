"""The packer's native module, `native`: None where smoe was built without one.

What it does is specified in NumPy (`smoe.artifacts.nested`, `smoe.artifacts.encodings`), which then
does it, slowly.
"""

from __future__ import annotations

try:
    import smoe.prep.pack._native as native
except ModuleNotFoundError:
    native = None  # type: ignore[assignment]
    # The mark of a build with SMOE_NO_NATIVE=1, as for the kernels: no source tree has it.
    try:
        import smoe.runtime.kernels._without_native  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError(
            "This smoe lacks its native packer. Install it (pip install .) where there is a C++ "
            "compiler, or with SMOE_NO_NATIVE=1 for slow packing in NumPy."
        ) from None
