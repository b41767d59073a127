"""Tests for those who write a backend or a remote of their own.

:class:`BackendContract` and :class:`RemoteContract` have one test for each promise of the
protocols. pytest runs them in a subclass that has a fixture; this package does not import pytest.
:class:`FaultyBackend` lets one operation of a backend fail, and :func:`check_faults` lets each fail
in turn.

Example::

    import pytest

    from msft_store.storage.backend import LocalBackend
    from msft_store.testing import BackendContract

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self, tmp_path):
            return LocalBackend(tmp_path)
"""

from msft_store.testing.backends import BackendContract, ReadContract
from msft_store.testing.faults import (
    ALL_OPERATIONS,
    WRITE_OPERATIONS,
    FaultyBackend,
    SimulatedKill,
    check_faults,
)
from msft_store.testing.remotes import RemoteContract

__all__ = [
    "ALL_OPERATIONS",
    "WRITE_OPERATIONS",
    "BackendContract",
    "FaultyBackend",
    "ReadContract",
    "RemoteContract",
    "SimulatedKill",
    "check_faults",
]
