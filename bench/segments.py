"""What the backbone costs, and how ONNX Runtime's threads get along with ours.  python bench/segments.py BUNDLE

Decode steps of the backbone alone (experts replaced by their input) and of the whole engine, in interleaved rounds
over the settings, medians in microseconds. `pool` is one pool per session or one for all; `spin` is whether idle
workers spin. Settings that are fixed per process run in processes of their own, a round each in turn.
"""

import json
import statistics
import subprocess
import sys

CHILD = """
import json, sys, time
import numpy as np, onnxruntime as ort
from smoe.artifacts import open_bundle
from smoe.runtime import Engine
bundle, pool, spin, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if pool == "global": ort.set_global_thread_pool_sizes(threads, 1)
plain = ort.InferenceSession
def session(path, options, **rest):
    options.use_per_session_threads = pool == "own"
    if spin == "1": options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    return plain(path, options, **rest)
ort.InferenceSession = session
with Engine.open(bundle, context=512, threads=threads) as engine:
    backbone, sequence, layers = engine._backbone, engine._sequence, engine.manifest.layers
    one, zero = np.array([1]), np.array([0])
    list(engine.generate(np.ones(200, np.int64), max_new_tokens=2))
    calls, steps = [], []
    for _ in range(60):
        values = backbone.begin(sequence, one, zero)
        spent = 0
        for i in range(len(layers) + 1):
            started = time.perf_counter(); backbone.run(i, values, sequence); spent += time.perf_counter() - started
            if i < len(layers): values[layers[i].wires.output] = values[layers[i].wires.hidden]
        calls.append(spent / (len(layers) + 1) * 1e6)
    for _ in range(60):
        started = time.perf_counter(); engine.step(sequence, one, zero); steps.append((time.perf_counter() - started) * 1e6)
        sequence.rewind(200)
    started = time.perf_counter(); list(engine.generate(np.arange(500) % 97 + 1, max_new_tokens=1)); prefill = time.perf_counter() - started
print(json.dumps([sorted(calls)[30], sorted(steps)[30], prefill * 1e6]))
"""

if __name__ == "__main__":
    settings = [(p, s, t) for p in ("own", "global") for s in ("0", "1") for t in ("1", "2")]
    got = {setting: [] for setting in settings}
    for _ in range(5):
        for setting in settings:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, sys.argv[1], *setting], capture_output=True, text=True, check=True
            )
            got[setting].append(json.loads(done.stdout))
    print("pool    spin threads   us/segment   us/decode step   us/prefill of 500")
    for setting, rounds in got.items():
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(
            f"{setting[0]:7} {setting[1]:4} {setting[2]:7}   {medians[0]:10.1f}   {medians[1]:14.0f}   {medians[2]:17.0f}"
        )
