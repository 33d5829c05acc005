"""The ways in which requests reach the core: pyfuse3, the device, the rings."""
