"""Some files are run for several protocols: attacks on masks for both that have them, crashes for all."""

from collections.abc import Iterator

import pytest

from tests.protocols.network import PROTOCOL

MASKED, ALL = ["masked", "layered"], ["masked", "layered", "homomorphic"]
PROTOCOLS = {
    "test_cohort": MASKED,
    "test_members": MASKED,
    "test_results": MASKED,
    "test_shares": MASKED,
    "test_resume": ALL,
}


@pytest.fixture(autouse=True)
def protocol(request: pytest.FixtureRequest) -> Iterator[str]:
    """By which protocol the studies of a test sum."""
    token = PROTOCOL.set(getattr(request, "param", "masked"))
    yield PROTOCOL.get()
    PROTOCOL.reset(token)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    protocols = PROTOCOLS.get(metafunc.module.__name__.rpartition(".")[2])
    if protocols is not None:
        metafunc.parametrize("protocol", protocols, indirect=True)
