"""What pyproject.toml has no words for: the optional C extension of the io_uring transport.

Without a compiler, Python's headers or liburing's, the build says so and goes on: sdeefs then
serves by its other transports, and `sdeefs doctor` tells why.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "sdeefs.transports._ring",
            ["sdeefs/transports/_ring.c"],
            libraries=["uring"],
            extra_compile_args=["-O2", "-std=gnu11"],
            optional=True,
        )
    ]
)
