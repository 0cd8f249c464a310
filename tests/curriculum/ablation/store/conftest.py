"""A faster disk for the tests of the store."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def fsyncless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
