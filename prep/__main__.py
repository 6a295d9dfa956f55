"""`smoe-prep`. A device without the extra is told what to install, by the first command that needs
it."""

from __future__ import annotations

import sys

from smoe.artifacts import SmoeError
from smoe.artifacts.errors import printable

NEEDED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "datasets",
    "pyarrow",
    "sklearn",
    "scipy",
    "threadpoolctl",
)


def main() -> None:
    """The command `smoe-prep`."""
    from smoe.prep.cli import cli

    try:
        cli(prog_name="smoe-prep")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        print(
            f"smoe-prep needs {error.name}, which is not installed. Install it with:  pip install "
            "'smoe[prep]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except (SmoeError, OSError) as error:
        print(printable(f"smoe-prep: {error}"), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
