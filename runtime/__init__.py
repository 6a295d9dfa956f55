"""On the device."""
