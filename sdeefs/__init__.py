"""A two-layer copy-on-write union filesystem in userspace, with overlayfs's formats and options."""

__version__ = "0.1.0"
#: The type of our mounts, as mountinfo has it.
OUR_TYPE = "fuse.sdeefs"
