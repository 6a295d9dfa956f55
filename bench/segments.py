"""What the backbone costs, and whose threads run it.  python bench/segments.py BUNDLE

Per setting, in processes of their own, a round each in turn: microseconds of wall clock per segment call (experts
replaced by their input), per decode step of the whole engine and per prefill of 500 tokens, medians; and seconds of
processor time per second of wall clock over the decode steps, which shows who spins.
"""

import json
import statistics
import subprocess
import sys

CHILD = """
import json, sys, time
import numpy as np, onnxruntime as ort
from smoe.runtime import Engine, backbone
bundle, pool, spin, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
plain = backbone.session_options
def options(count):
    chosen = plain(count)
    chosen.use_per_session_threads = pool == "own"
    chosen.add_session_config_entry("session.intra_op.allow_spinning", spin)
    return chosen
backbone.session_options = options
if pool == "global": ort.set_global_thread_pool_sizes(threads, 1)
with Engine.open(bundle, context=512, threads=threads) as engine:
    runner, sequence, layers = engine._backbone, engine._sequence, engine.manifest.layers
    one, zero = np.array([1]), np.array([0])
    list(engine.generate(np.ones(200, np.int64), max_new_tokens=2))
    calls, steps = [], []
    for _ in range(100):
        values = runner.begin(sequence, one, zero)
        spent = 0
        for i in range(len(layers) + 1):
            started = time.perf_counter(); runner.run(i, values, sequence); spent += time.perf_counter() - started
            if i < len(layers): values[layers[i].wires.output] = values[layers[i].wires.hidden]
        calls.append(spent / (len(layers) + 1) * 1e6)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(100):
        started = time.perf_counter()
        engine.step(sequence, one, zero)
        steps.append((time.perf_counter() - started) * 1e6)
        sequence.rewind(200)
    busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
    started = time.perf_counter()
    list(engine.generate(np.arange(500) % 97 + 1, max_new_tokens=1))
    prefill = time.perf_counter() - started
print(json.dumps([sorted(calls)[50], sorted(steps)[50], prefill * 1e6, busy]))
"""

if __name__ == "__main__":
    settings = [
        ("own", "0", "1"),
        ("own", "0", "2"),
        ("own", "1", "2"),
        ("global", "-", "1"),
        ("global", "-", "2"),
    ]
    got = {setting: [] for setting in settings}
    for _ in range(7):
        for setting in settings:
            arguments = [
                sys.argv[1],
                setting[0],
                "0" if setting[1] == "-" else setting[1],
                setting[2],
            ]
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            got[setting].append(json.loads(done.stdout))
    print("pool    spin threads   us/segment   us/decode step   us/prefill of 500   cores busy")
    for setting, rounds in got.items():
        call, step, prefill, busy = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        print(
            f"{setting[0]:7} {setting[1]:4} {setting[2]:7}   {call:10.1f}   {step:14.0f}   {prefill:17.0f}   {busy:10.2f}"
        )
