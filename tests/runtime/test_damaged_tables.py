"""Damaged tables that are programs still run, natively and in NumPy, to the same bits. (`python -m
bench soak programs` does it with 100,000.)"""

from support import damage, damaged_runs


def test_damaged_tables_end_at_the_door_or_run():
    counts, wrong = damaged_runs.many(2000, seed=1)
    assert not wrong
    assert sum(counts.values()) == 2000 and counts[damage.HEALTHY] > 50
