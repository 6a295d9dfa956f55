"""In the wheel only if it was built with SMOE_NO_NATIVE=1: says that the native kernels were left out on purpose."""
