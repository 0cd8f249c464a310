"""Whether the model hub can be reached, found out once and quickly.

Contract: `cached_only` makes one request of a few seconds before the libraries of Hugging Face make theirs, which they repeat for
half a minute without a word. Without a network, a model that is in the cache is read from there, and any other is refused.
"""

from __future__ import annotations

from sparsort.errors import SparsortError

_SECONDS = 5.0
# Hubs that have answered this process.
_REACHED: set[str] = set()


def cached_only(model: str, *, revision: str | None = None) -> bool:
    """Whether the files of a hub model are to be read from the cache alone, since the hub does not answer.

    Args:
        model: a hub id.
        revision: the revision that will be loaded.

    Raises:
        SparsortError: the hub does not answer, and the cache does not hold the model.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if constants.is_offline_mode() or constants.ENDPOINT in _REACHED:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of the transport, whose library changes with the version of huggingface_hub
        try:
            held = try_to_load_from_cache(model, "config.json", revision=revision)
        except HFValidationError:
            held = None
        if isinstance(held, str):
            return True
        raise SparsortError(
            f"the model {model!r} is not a folder, and the hub at {constants.ENDPOINT} cannot be reached to look for it there "
            f"({str(error).strip() or type(error).__name__}). Give a folder with config.json and weights, a .gguf file or "
            "'demo', or connect this machine to the network."
        ) from error
    _REACHED.add(constants.ENDPOINT)
    return False
