"""How much is tried: the same few examples in every run of the tests, and new ones by `make fuzz`.

`max_examples` is a percentage here (`outcomes.inputs`). After the tests, a line of JSON says what was tried and what
went wrong.
"""

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.outcomes import FAILURES, INPUTS

settings.register_profile(
    "few", max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("fuzz", settings.get_profile("few"), max_examples=100, derandomize=False, print_blob=True)
settings.load_profile("few")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_unconfigure(config: pytest.Config) -> None:
    if settings.default is not None and settings.get_current_profile_name() == "fuzz":
        print(json.dumps({"inputs": INPUTS.total(), **INPUTS, **FAILURES}))
