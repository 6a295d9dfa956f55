"""Beginnings that outlive the server: what is kept of prompts when it ends lies in a directory, and
the next server begins with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from smoe.runtime import session
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.serve.prefixes import KEPT, Past, Prefixes

SUFFIX = ".prompt"
OURS = re.compile(r"[0-9a-f]{32}\.prompt")


class PromptCache:
    """Files of `directory`, a session (`runtime.session`) for each beginning, as untrusted as those
    are. No more than `KEPT` stay, the last used ones, of however many bundles; other files of the
    directory are nobody's business.

    The directory is made, for its owner alone, if its parent is there; an `EngineError` where it
    cannot be."""

    def __init__(self, directory: Path):
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"{directory} cannot be made for a prompt cache ({error.strerror}); name another "
                "directory, in one that is there."
            ) from error
        session.refuse_unwritable(directory / f"new{SUFFIX}")

    def fill(self, engine: Engine, prefixes: Prefixes) -> str:
        """Keep those that go with `engine`, the last used ones first, as far as there is room for
        what they remember; a line for people. Files of others, and damaged ones, are left alone."""
        room, pasts = engine.plan.state, list[Past]()
        for file in reversed(self._files()):
            with contextlib.suppress(EngineError, FileNotFoundError):
                if file.stat().st_size > room:
                    break
                sequence, _ = session.read(engine, file)
                pasts.append(Past.of(sequence, sequence.length))
                room -= engine.held_bytes(sequence.length)
        for past in reversed(pasts):
            prefixes.keep(past)
        return f"prompt cache: {len(pasts)} beginnings of {self._directory}"

    def store(self, engine: Engine, prefixes: Prefixes) -> str:
        """Write those that are kept and are not there yet; a line for people."""
        kept = prefixes.kept
        try:
            for past in kept:
                file = self._directory / (_name(engine, past) + SUFFIX)
                if file.exists():
                    os.utime(file)
                else:
                    session.save(engine, file, sequence=past.sequence)
            for file in self._files()[:-KEPT]:
                file.unlink(missing_ok=True)
        except (EngineError, OSError) as error:
            return f"prompt cache: {error}"
        return f"prompt cache: {len(kept)} beginnings in {self._directory}"

    def _files(self) -> list[Path]:
        """The last used last."""
        files = [file for file in self._directory.iterdir() if OURS.fullmatch(file.name)]
        return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def _name(engine: Engine, past: Past) -> str:
    told = json.dumps(session.goes_with(engine)).encode() + past.ids.tobytes()
    return hashlib.sha256(told).hexdigest()[:32]
