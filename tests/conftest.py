"""Every test that needs a kernel runs on every instruction set this machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from helpers import EXAMPLES
from regard import _backend

# Deadlines would assert times on machines we do not know. The default profile draws the same
# examples every time, so that a red run is a red commit; "explore" looks for new ones.
_common = dict(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,  # `backend` holds for all examples
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile("regard", max_examples=25, derandomize=True, **_common)
hypothesis.settings.register_profile("explore", max_examples=1000, **_common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "regard"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; leave out with -m 'not slow'")


@pytest.fixture(params=_backend.possible())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that the public functions use in this test."""
    with _backend.using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def importable_examples() -> Iterator[None]:
    """The examples can be imported, as they import each other."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
