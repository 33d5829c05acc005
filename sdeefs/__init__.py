"""A two-layer copy-on-write union filesystem in userspace, with overlayfs's formats and options."""
