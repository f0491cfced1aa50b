"""Fixtures of every test of the Hub: one server and two users for all of them. `pytest_plugins = ["tests.hub.fixtures"]`."""

from __future__ import annotations

import pytest

from .process import Process
from .server import serve


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="session")
def alice(hub, tmp_path_factory):
    """Pushes."""
    with Process(hub.environment(tmp_path_factory.mktemp("alice"), "alice")) as process:
        yield process


@pytest.fixture(scope="session")
def reader(hub, tmp_path_factory):
    """Has no token, an empty cache, and made nothing."""
    with Process(hub.environment(tmp_path_factory.mktemp("reader"))) as process:
        yield process


READING = ("pull", "classify", "download", "rows_of")


@pytest.fixture
def user(alice, reader):
    """`user(action, ...)`: what only reads is done by the reader, the rest by alice."""
    return lambda action, **arguments: (reader if action in READING else alice).call("tests.hub.actions", action, **arguments)
