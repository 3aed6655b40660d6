"""What every test runs under: one deterministic Hypothesis profile and loud background failures."""

from __future__ import annotations

import faulthandler
import os

from hypothesis import HealthCheck, settings

faulthandler.enable()

settings.register_profile(
    "gate",
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("soak", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("PAGEFERRY_HYPOTHESIS", "gate"))
