"""The lean install: importing and running the device side loads none of the extras."""

import json
import re
import subprocess
import sys

import pytest

EXTRAS = {
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "huggingface_hub",
    "starlette",
    "uvicorn",
    "h11",
    "prometheus_client",
    "llguidance",
    "sklearn",
    "onnx",
    "onnxscript",
    "onnx_ir",
}


def _loaded(code: str, *arguments: str) -> list[str]:
    print_modules = "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + print_modules, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _extras(loaded: list[str]) -> list[str]:
    return [name for name in loaded if name.split(".")[0] in EXTRAS or name.startswith("smoe.prep")]


def test_generating_loads_none_of_the_extras(golden):
    code = """
import sys
from smoe.runtime import Engine
with Engine.open(sys.argv[1], context=32) as engine:
    list(engine.generate("x", max_new_tokens=2))
"""
    loaded = _loaded(code, str(golden))
    assert "smoe.runtime.engine" in loaded
    assert not _extras(loaded)


def test_the_device_commands_load_none_of_the_extras():
    loaded = _loaded("import smoe.runtime.cli")
    assert "click" in loaded and not _extras(loaded)


PURE = ("cache.residency", "cache.eviction", "cache.predict", "choose.substitution", "errors")


def test_the_rooms_without_io_load_no_onnxruntime():
    code = "import smoe.runtime\n" + "\n".join(f"import smoe.runtime.{name}" for name in PURE)
    loaded = _loaded(code)
    assert "smoe.runtime.cache.eviction" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("onnxruntime", "click")]


def test_the_package_offers_its_names_and_its_version():
    import smoe.runtime

    assert all(getattr(smoe.runtime, name).__name__ == name for name in smoe.runtime.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", smoe.runtime.__version__)
    assert set(smoe.runtime.__all__) <= set(dir(smoe.runtime))
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        smoe.runtime.Motor  # noqa: B018


def test_artifacts_need_numpy_and_the_standard_library():
    loaded = _loaded("import smoe.artifacts")
    assert "numpy" in loaded
    assert not _extras(loaded)
    assert not [
        n for n in loaded if n.split(".")[0] in ("onnxruntime", "tokenizers", "jinja2", "click")
    ]


def test_help_and_replays_of_smoe_prep_load_none_of_the_extras(golden):
    for command in ("['--help']", f"['simulate', {str(golden)!r}, '--residency', '0.5']"):
        loaded = _loaded(f"from smoe.prep.cli import cli; cli({command}, standalone_mode=False)")
        assert "smoe.prep.cli" in loaded and not [
            name for name in loaded if name.split(".")[0] in EXTRAS
        ]


def test_smoe_prep_without_its_extra_says_what_to_install():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["smoe-prep", "export", "model", "-o", "out"]
from smoe.prep.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "pip install 'smoe[prep]'" in done.stderr
        and "Traceback" not in done.stderr
    )


WITHOUT = """
import importlib.machinery, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "smoe.runtime.kernels._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "smoe.runtime.kernels._without_native" and sys.argv[1] == "chosen":
            return importlib.machinery.ModuleSpec(name, None, is_package=True)
        if name == "smoe.runtime.kernels._without_native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from smoe.runtime import kernels
print(kernels.available(), kernels.choose().reason)
"""


def test_missing_native_kernels_are_an_error_unless_they_were_left_out_on_purpose(root):
    def run(chosen):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT, chosen], capture_output=True, text=True
        )

    assert run("chosen").stdout == "['reference'] built with SMOE_NO_NATIVE=1\n"
    broken = run("broken")
    assert broken.returncode != 0 and "smoe lacks its native kernels" in broken.stderr
    assert not list(root.glob("runtime/kernels/_without*")), "a work tree would be slow in silence"
