"""What `import smoe.runtime` costs over what it is made of:  python bench/imports.py

Fresh processes, interleaved; the median wall time of each, and the ratio.
"""

import statistics
import subprocess
import sys
import time

CODES = {"numpy, onnxruntime": "import numpy, onnxruntime", "smoe.runtime": "import smoe.runtime"}


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    times: dict[str, list[float]] = {name: [] for name in CODES}
    for _ in range(21):
        for name, code in CODES.items():
            times[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:20} {value * 1e3:6.0f} ms")
    base, ours = medians.values()
    print(f"ratio {ours / base:.2f}")
