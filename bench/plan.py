"""What smoe-prep plan expects beside what smoe bench measures:  python bench/plan.py BUNDLE [--residency .25 .4]

The machine is measured first, with the bundle and with reads past the page cache; then every budget is run on text that
no table was made from. Expectations come from the bundle's trace, which is calibration text.
"""

import tempfile
from pathlib import Path

from policies import CONTEXT, Subject
from prices import arguments

from smoe.prep.replay.plan import plan
from smoe.runtime.device_profile import measure_device

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.set_defaults(residency=[0.25, 0.4, 0.55, 0.7, 0.85])
    chosen = parser.parse_args()
    device = measure_device(chosen.bundle, chosen.io)
    print(device.to_json())
    print(
        "| resident | options | tok/s expected | measured | ratio | loss expected | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(chosen.bundle, chosen.text, chosen.tokens, 0, Path(directory))
        for residency in chosen.residency:
            for c in plan(chosen.bundle, device, [subject.budget(residency)], CONTEXT):
                if c.level:
                    continue  # another engine: `Subject` runs all levels
                run = subject.run(c.policies, residency, chosen.io)
                ratio = f"{c.loss / run['kl']:.2f}" if c.policies.loss else ""
                print(f"| {residency:.0%} | {c.options or 'lossless'} | {c.tokens_per_second:.1f} | "
                      f"{run['tokens_per_second']:.1f} | {c.tokens_per_second / run['tokens_per_second']:.2f} | {c.loss:.4f} | "
                      f"{run['kl']:.4f} | {ratio} |", flush=True)  # fmt: skip
