"""What pyproject.toml has no words for: the optional C extensions.

Without a compiler, Python's headers or (for the io_uring transport) liburing's, the build says so and
goes on: sdeefs then serves without them, and `sdeefs doctor` tells why.
"""

import glob

from setuptools import Extension, setup

SHARED = "sdeefs/transports/_serving.h"

setup(
    ext_modules=[
        Extension(
            "sdeefs.transports._ring",
            ["sdeefs/transports/_ring.c"],
            depends=[SHARED],
            libraries=["uring"],
            extra_compile_args=["-O2", "-std=gnu11"],
            optional=True,
        ),
        Extension(
            "sdeefs.transports._device",
            ["sdeefs/transports/_device.c"],
            depends=[SHARED],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
            optional=True,
        ),
        Extension(
            "sdeefs.transports._shortcuts",
            sorted(glob.glob("sdeefs/transports/shortcuts/*.c")),
            depends=[SHARED, *sorted(glob.glob("sdeefs/transports/shortcuts/*.h"))],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
            optional=True,
        ),
    ]
)
