"""Where the figures come from: `python -m bench` lists the benches, `python -m bench NAME` runs
one.

A bench is a function of what the command line said that yields tables. `harness` does what all of
them need: turns, medians, processes of their own, Markdown, a JSON record. Run from the root of the
repository, with smoe importable.
"""
