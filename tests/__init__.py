"""Tests, laid out like trainer/."""

import os
import re

_COUNT = "--xla_force_host_platform_device_count"


def xla_flags(devices: int = 1) -> str:
    """The XLA_FLAGS of the tests for a process with `devices` fake CPU devices."""
    return re.sub(rf"{_COUNT}=\S+", "", os.environ.get("XLA_FLAGS", "")) + f" {_COUNT}={devices}"
