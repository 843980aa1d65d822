"""Settings every test shares."""

from hypothesis import settings

# Deadlines measure the machine, not the code.
settings.register_profile("zoetrope", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("zoetrope")
