"""One function of a bench in a process of its own:  python -m bench.child MODULE:FUNCTION ARGUMENTS

ARGUMENTS are a JSON object of keywords; what the function returns is printed as the last line, as
JSON. Imports nothing but what the function's module does, so that its memory is that of what is
measured.
"""

import importlib
import json
import sys

if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(f"bench.{module}"), name)
    print("\n" + json.dumps(function(**json.loads(sys.argv[2]))))
