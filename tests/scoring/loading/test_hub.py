"""`scoring.loading.hub`: without a network a hub id is refused at once, or read from the cache; no request is made twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from sparsort.errors import SparsortError
from sparsort.scoring.loading import demo_model as embedded
from sparsort.scoring.loading import hub
from sparsort.scoring.loading.load import load_model


class Session:
    """A session that counts its requests, and answers or does not."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.requests = error, 0

    def head(self, url: str, timeout: float) -> Any:
        assert url == constants.ENDPOINT
        assert timeout <= 10
        self.requests += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(status_code=200)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    made = Session(OSError("Name or service not known"))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: made)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_REACHED", set())
    return made


def test_a_hub_that_does_not_answer_is_asked_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: None)
    message = (
        r"'org/model' is not a folder, and the hub at http.*cannot be reached.*Name or service not known.*Give a folder"
    )
    for load in (load_model, embedded.load_tokenizer):
        session.requests = 0
        with pytest.raises(SparsortError, match=message):
            load("org/model")
        assert session.requests == 1


def test_a_model_in_the_cache_is_read_from_there(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def held(model: str, file: str, revision: str | None) -> str:
        asked.append((model, file, revision))
        return "/cache/config.json"

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", held)
    assert hub.cached_only("org/model", revision="v1")
    assert asked == [("org/model", "config.json", "v1")]


def test_a_hub_that_answered_is_not_asked_again(session: Session) -> None:
    session.error = None
    assert not hub.cached_only("org/model")
    assert not hub.cached_only("org/other")
    assert session.requests == 1


def test_offline_mode_and_folders_make_no_request(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.cached_only("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SparsortError, match="cannot load the tokenizer"):
        embedded.load_tokenizer(str(tmp_path))
    assert session.requests == 0
