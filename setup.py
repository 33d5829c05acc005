"""What pyproject.toml has no words for: the optional C extensions, and a small program in C.

Without a compiler, Python's headers or (for the io_uring transport) liburing's, the build says so and
goes on: sdeefs then serves without them, and `sdeefs doctor` tells why. Without the program `sdee run`
takes some milliseconds longer.
"""

import glob
import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SHARED = "sdeefs/transports/_serving.h"


class Build(build_ext):
    """The extensions, and the program that asks the daemon while the interpreter starts."""

    def run(self) -> None:
        """All of it."""
        super().run()
        if self.inplace:
            return  # an installation by reference does without
        target = os.path.join(self.build_lib, "sdee_launch")
        try:
            objects = self.compiler.compile(
                ["sdee_launch/ask.c"], self.build_temp, extra_postargs=["-O2", "-std=gnu11"]
            )
            self.compiler.link_executable(objects, "sdee-ask", target)
        except Exception as error:  # as setuptools has it for what is optional
            self.warn(f"sdee run will start without sdee-ask: {error}")


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "sdeefs.transports._ring",
            ["sdeefs/transports/_ring.c"],
            depends=[SHARED],
            libraries=["uring"],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
            optional=True,
        ),
        Extension(
            "sdeefs.transports._device",
            ["sdeefs/transports/_device.c"],
            depends=[
                SHARED,
                "sdeefs/transports/_following.h",
                "sdeefs/transports/_forgetting.h",
                "sdeefs/transports/shortcuts/wire.h",
            ],
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
    ],
)
