"""The versions of the packages that decide the bits of a run."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("belief-trainer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """The version of Python and of each package. A package that is imported without being installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # trainer/ in a checkout that is not installed
            found[package] = version(package)
    return found
