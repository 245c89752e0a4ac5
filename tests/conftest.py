"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples in every run, whatever the machine's speed: a check that fails by chance is not believed.
# HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
