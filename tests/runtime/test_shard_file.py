"""File systems that refuse to be read past the page cache, give little at a time, or fail: injected
into `os.preadv`, and real ones where they can be mounted."""

import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.shard_file import BLOCK, ShardFile

PREADV = getattr(os, "preadv", None)
pytestmark = pytest.mark.skipif(
    PREADV is None or not hasattr(os, "O_DIRECT"), reason="this system has no direct reads"
)


@pytest.fixture
def direct(tmp_path):
    """A directory whose files can be read past the page cache."""
    file = tmp_path / "probe"
    file.write_bytes(bytes(BLOCK))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct reads below {tmp_path}: {error}")
    return tmp_path


@pytest.fixture
def bundle(golden, direct) -> Path:
    return Path(shutil.copytree(golden, direct / "bundle.smoe"))


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def _named(file: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{file}"))


def _generated(bundle, **how) -> tuple[list[int], Engine]:
    budget = memory_for(open_bundle(bundle), 5, 300)
    policies = Policies(prefetch="none")
    with Engine.open(bundle, beside=budget, context=300, policies=policies, **how) as engine:
        tokens = [token.id for token in engine.generate([5, 6, 7], max_new_tokens=24)]
        lines = "\n".join(engine.mode_lines())
    return tokens, lines, engine.stats


def _refusing(names: tuple[str, ...], code: int, after: int = 0):
    """`os.preadv` of a kernel that refuses direct reads of files with these names."""
    count = itertools.count()

    def preadv(file, buffers, at):
        if _is_direct(file) and _named(file) in names and next(count) >= after:
            raise OSError(code, os.strerror(code))
        return PREADV(file, buffers, at)

    return preadv


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_shard_that_is_not_read_directly_is_read_otherwise_and_the_others_go_on(
    bundle, monkeypatch, code
):
    wanted, lines, _ = _generated(bundle, io="direct")
    assert "reads: direct (asked for" in lines and "buffered" not in lines
    monkeypatch.setattr(os, "preadv", _refusing(("layer-00.safetensors",), code))
    tokens, lines, stats = _generated(bundle, io="direct")
    assert tokens == wanted
    assert lines.count("layer-00.safetensors buffered, which their file system does not") == 1
    assert os.strerror(code) in lines and "layer-01" not in lines
    assert stats.bytes_read > 0


def test_a_refusal_in_the_middle_is_counted_and_changes_no_bit(bundle, monkeypatch):
    wanted, _, _ = _generated(bundle, io="direct")
    names = ("layer-00.safetensors", "layer-01.safetensors")
    monkeypatch.setattr(os, "preadv", _refusing(names, errno.EINVAL, after=30))
    tokens, lines, stats = _generated(bundle, io="direct")
    assert tokens == wanted and stats.shards_buffered == 2
    assert "layer-00.safetensors and 1 others buffered" in lines or "layer-01" in lines


def test_where_no_direct_read_works_it_is_said_or_refused(bundle, monkeypatch):
    names = ("layer-00.safetensors", "layer-01.safetensors")
    monkeypatch.setattr(os, "preadv", _refusing(names, errno.EINVAL))
    _, lines, _ = _generated(bundle)
    assert "reads: buffered (no other way here: Invalid argument)" in lines
    with pytest.raises(EngineError, match="cannot be read direct here: Invalid argument"):
        _generated(bundle, io="direct")


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("most", [1, 700, 4096, 5000, 12288])
def test_short_reads_are_continued(direct, monkeypatch, io, most):
    """A direct read must go on at a block; where it ends within one, it goes on otherwise."""
    content = os.urandom(9 * BLOCK)
    (direct / "file").write_bytes(content)
    beginnings = []

    def preadv(file, buffers, at):
        beginnings.append((_is_direct(file), at))
        return PREADV(file, [buffers[0][:most]] if not _is_direct(file) else buffers, at) and (
            min(most, len(buffers[0]))
        )

    monkeypatch.setattr(os, "preadv", preadv)
    refused: list = []
    file = ShardFile(direct / "file", io == "direct", lambda path, why: refused.append(why))
    into = _aligned(6 * BLOCK)
    small = memoryview(into)[: 6 * BLOCK if most > 1 else 64]
    if most == 1 and io == "direct":
        small = memoryview(into)[:BLOCK]
    assert file.read(small, 2 * BLOCK) == len(small)
    assert bytes(small) == content[2 * BLOCK :][: len(small)]
    assert all(at % BLOCK == 0 for direct_read, at in beginnings if direct_read)
    assert bool(refused) == (io == "direct" and most < BLOCK) and len(refused) <= 1
    file.close()


def _aligned(nbytes: int):
    import mmap

    return mmap.mmap(-1, nbytes)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_what_is_interrupted_or_busy_is_asked_for_again(bundle, monkeypatch, code):
    wanted, _, _ = _generated(bundle, io="direct")
    count = itertools.count()

    def preadv(file, buffers, at):
        if next(count) % 3 == 0:
            raise OSError(code, os.strerror(code))
        return PREADV(file, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    tokens, _, stats = _generated(bundle, io="direct")
    assert tokens == wanted and stats.shards_buffered == 0


@pytest.mark.parametrize(("code", "advice"), [
    (errno.EIO, "see the system's log, and copy the bundle to another place"),
    (errno.ESTALE, "open the bundle again"),
    (errno.ENOTCONN, "mount it, and open the bundle again"),
    (errno.ETIMEDOUT, "see to the connection"),
    (errno.EAGAIN, "busy every time"),
    (errno.ENXIO, "see that it can be read"),
])  # fmt: skip
def test_what_fails_in_earnest_is_a_sentence_and_the_next_call_runs(
    bundle, monkeypatch, code, advice
):
    wanted, _, _ = _generated(bundle, io="buffered")
    budget = memory_for(open_bundle(bundle), 5, 300)
    with Engine.open(bundle, beside=budget, context=300, io="buffered") as engine:

        def preadv(file, buffers, at):
            if _named(file) == "layer-01.safetensors":
                raise OSError(code, os.strerror(code))
            return PREADV(file, buffers, at)

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(EngineError, match=advice) as caught:
            list(engine.generate([5, 6, 7], max_new_tokens=24))
        assert f"{bundle}/experts/layer-01.safetensors: reading expert" in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        monkeypatch.setattr(os, "preadv", PREADV)
        tokens = [token.id for token in engine.generate([5, 6, 7], max_new_tokens=24)]
        assert tokens == wanted


# -- real ones -----------------------------------------------------------------------------

CHILD = """
import sys
from smoe.artifacts import open_bundle
from smoe.runtime import Engine
from smoe.runtime.budget import memory_for
budget = memory_for(open_bundle(sys.argv[1]), 5, 300)
for io in (None, "buffered"):
    with Engine.open(sys.argv[1], beside=budget, context=300, io=io) as engine:
        print([token.id for token in engine.generate([5, 6, 7], max_new_tokens=24)])
    print("\\n".join(engine.mode_lines()), file=sys.stderr)
"""


@pytest.mark.parametrize("mount", ["-t ramfs none", "-t tmpfs none", "loop", "overlay"])
def test_real_file_systems(golden, tmp_path, mount):
    """Each in a mount namespace of its own: one that refuses to be opened for direct reads, memory,
    a device of its own, a layered one."""
    place, image = tmp_path / "there", tmp_path / "image"
    place.mkdir()
    commands = f"mount {mount} {place} && cp -r {golden} {place}/b.smoe"
    if mount == "loop":
        commands = (
            f"truncate -s 8M {image} && mke2fs -q -F -b 1024 {image} && mount -o loop {image} "
            f"{place} && cp -r {golden} {place}/b.smoe"
        )
    if mount == "overlay":
        for name in ("low", "up", "work"):
            (tmp_path / name).mkdir()
        commands = (
            f"mount -t tmpfs none {tmp_path}/up && mkdir {tmp_path}/up/u {tmp_path}/up/w && "
            f"cp -r {golden} {tmp_path}/low/b.smoe && mount -t overlay none -o lowerdir={tmp_path}"
            f"/low,upperdir={tmp_path}/up/u,workdir={tmp_path}/up/w {place}"
        )
    script = f'({commands}) || exit 77; exec "$@"'
    child = [sys.executable, "-c", CHILD, f"{place}/b.smoe"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *child], capture_output=True, text=True
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second == str(_generated(golden)[0])
    if "ramfs" in mount:
        assert "reads: buffered (no other way here: Invalid argument)" in done.stderr
