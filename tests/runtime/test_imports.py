"""The lean install: importing and running the device side loads none of the extras."""

import json
import subprocess
import sys

EXTRAS = {"torch", "transformers", "safetensors", "datasets", "sklearn", "onnx", "onnxscript", "onnx_ir"}


def _loaded(code: str, *arguments: str) -> list[str]:
    print_modules = "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + print_modules, *arguments], capture_output=True, text=True)
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


def test_artifacts_need_numpy_and_the_standard_library():
    loaded = _loaded("import smoe.artifacts")
    assert "numpy" in loaded
    assert not _extras(loaded)
    assert not [n for n in loaded if n.split(".")[0] in ("onnxruntime", "tokenizers", "jinja2", "click")]


def test_smoe_prep_without_its_extra_says_what_to_install():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["smoe-prep", "--help"]
from smoe.prep.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'smoe[prep]'" in done.stderr and "Traceback" not in done.stderr
