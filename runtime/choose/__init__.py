"""What goes, what stands in, what is fetched early: pure decisions, without I/O and without a
clock.

The engine and `smoe-prep simulate` drive the same objects, so a policy meets Belady's bound before
it meets a device."""
