"""A two-layer copy-on-write union filesystem in userspace, with overlayfs's formats and options."""

__version__ = "0.1.0"
