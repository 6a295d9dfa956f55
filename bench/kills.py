"""Builds killed at random moments give the same bytes:  python bench/kills.py [KILLS] [SEED]

The example model is built once in peace. Then builds are killed (SIGKILL) at moments drawn evenly over the time that
took, and started again with the same command, until so many kills have happened; every bundle that is finished on the
way is compared with the first, byte for byte.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def command(output: Path) -> list[str]:
    return [
        sys.executable, "-m", "smoe.prep", "build", str(EXAMPLES / "reference"), "-o", str(output),
        "--calibration", str(EXAMPLES / "calibration.jsonl"), "--tokens", "16384", "--encoding", "f32",
    ]  # fmt: skip


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(f.relative_to(bundle)): f.read_bytes() for f in bundle.rglob("*") if f.is_file()}


def main(kills: int, seed: int) -> int:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        subprocess.run(command(Path(folder) / "whole"), check=True, capture_output=True)
        usual, wanted = time.monotonic() - started, contents(Path(folder) / "whole")
        print(f"one build in peace: {usual:.0f} s, {len(wanted)} files")
        killed = builds = different = 0
        output = Path(folder) / "killed"
        while killed < kills or not output.exists():
            process = subprocess.Popen(
                command(output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            after = chance.uniform(0, usual)
            try:
                if killed < kills:
                    process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
                left = sorted(
                    f.name for f in output.with_name("killed.partial").rglob("*") if f.is_file()
                )
                print(f"kill {killed} after {after:.1f} s: {len(left)} files left")
            said = process.communicate()[1]
            if process.returncode == 0 or output.exists():
                builds += 1
                different += contents(output) != wanted
                if killed < kills:
                    shutil.rmtree(output)
            elif process.returncode != -signal.SIGKILL:
                raise SystemExit(f"a build ended with {process.returncode}: {said}")
        print(f"{killed} kills, {builds} finished builds, {different} of them with other bytes")
    return different


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(
        min(1, main(arguments[0] if arguments else 20, arguments[1] if len(arguments) > 1 else 0))
    )
