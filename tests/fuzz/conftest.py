"""How much is tried: the same few examples in every run of the tests, and new ones by `make fuzz`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "few", max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("fuzz", settings.get_profile("few"), max_examples=700, derandomize=False, print_blob=True)
settings.load_profile("few")
