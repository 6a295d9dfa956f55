"""Machines where nothing can be written: root, bundle and /tmp read only, no HOME, no TMPDIR, no
working directory."""

import os
import subprocess
import sys

import pytest

# Everything that is mounted becomes read only, for this process and its children alone.
READ_ONLY = """
mount --make-rprivate / || exit 77
awk '{print $5}' /proc/self/mountinfo | sort -ru | while read -r place; do
    mount -o remount,ro,bind "$place" 2>/dev/null
done
for place in /tmp /var/tmp /dev/shm "$HOME" "$PWD" "$1"; do
    if touch "$place/written" 2>/dev/null; then echo "$place can be written to" >&2; exit 77; fi
done
shift; exec "$@"
"""


def _run(bundle, *arguments, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smoe.runtime", "run", str(bundle), *arguments]
    return subprocess.run(
        [*how.pop("inside", []), *command], capture_output=True, text=True, timeout=60, **how
    )


def _inside(bundle, *unshare: str) -> list[str]:
    return [*(unshare or ("unshare", "-m")), "sh", "-c", READ_ONLY, "sh", str(bundle)]


def _skip_where_refused(done: subprocess.CompletedProcess) -> None:
    if done.returncode in (1, 77) and "smoe: " not in done.stderr:
        pytest.skip(f"no read-only root can be made here: {done.stderr.strip()[-200:]}")


def _environment(*without: str, **changed: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in without}
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    return kept | {"PYTHONPATH": ":".join(paths)} | changed


@pytest.mark.parametrize("unshare", [("unshare", "-m"), ("unshare", "-r", "-m")])
def test_nothing_needs_to_be_written(copied, unshare):
    wanted = _run(copied, "def main", "--max-new-tokens", "8").stdout
    environment = _environment("TMPDIR", "ORT_DISABLE_TELEMETRY")
    for more in ((), ("--memory", "300MiB"), ("--level", "1")):
        arguments = ("def main", "--max-new-tokens", "8", *more)
        done = _run(copied, *arguments, inside=_inside(copied, *unshare), env=environment)
        _skip_where_refused(done)
        assert done.returncode == 0, done.stderr
        assert done.stdout == wanted
        assert done.stderr.startswith("model: "), "nothing else speaks"


@pytest.mark.parametrize("case", ["no HOME", "HOME is no directory", "TMPDIR is missing"])
def test_places_that_are_not_there_are_not_needed(golden, case):
    environment = {
        "no HOME": _environment("HOME"),
        "HOME is no directory": _environment(HOME="/dev/null"),
        "TMPDIR is missing": _environment(TMPDIR="/no/such/folder"),
    }[case]
    done = _run(golden, "def", "--max-new-tokens", "4", env=environment)
    assert done.returncode == 0, done.stderr


def test_a_working_directory_that_is_gone_is_not_needed(golden, tmp_path):
    (tmp_path / "gone").mkdir()
    script = f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$@"'
    done = _run(
        golden, "def", "--max-new-tokens", "4", inside=["sh", "-c", script, "sh"],
        env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_left_in_the_home_of_who_runs_it(golden, tmp_path):
    environment = _environment("ORT_DISABLE_TELEMETRY", "CI", HOME=str(tmp_path))
    done = _run(golden, "def", "--max-new-tokens", "4", env=environment)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_name_need_a_place_to_write_to(copied):
    """No bundle of ours has them; the format allows it."""
    backbone = copied / "backbone"
    (backbone / "weights.data").rename(backbone / "weightz.data")
    for file in (copied / "manifest.json", *backbone.glob("*.onnx")):
        file.write_bytes(file.read_bytes().replace(b"weights.data", b"weightz.data"))
    done = _run(copied, "def", "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    done = _run(copied, "def", inside=_inside(copied), env=_environment("TMPDIR"))
    _skip_where_refused(done)
    assert done.returncode == 1 and "There is no folder for temporary files" in done.stderr
    assert "weightz.data; set TMPDIR" in done.stderr and "Traceback" not in done.stderr
