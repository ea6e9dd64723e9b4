from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="module")
def one_ray() -> None:
    """One Ray for all tests of this process but those of clusters: it takes seconds to start."""
    import ray

    from prorl_nemo.training.session import start_ray

    if not ray.is_initialized():
        start_ray()


def pytest_sessionfinish() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
