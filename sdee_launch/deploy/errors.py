"""What can go wrong in deployment, as one line for the user."""

from __future__ import annotations


class DeployProblem(Exception):
    """Something could not be packed, brought or unpacked; the text names it and the mend."""


class Damaged(DeployProblem):
    """A package, a manifest or a cached generation isn't what it was: a full copy mends it."""
