"""Finds out quickly, and once per process, whether the model hub can be reached.

Contract: `cached_only` makes one request with a timeout of a few seconds. Without it, the libraries of Hugging Face would repeat
their own requests for half a minute without any output. If there is no network, a model in the cache is read from there, and any
other model is refused.
"""

from __future__ import annotations

from sparsort.errors import SparsortError

_TIMEOUT_SECONDS = 5.0
# The addresses of the hubs that have answered this process.
_REACHED: set[str] = set()


def cached_only(model: str, *, revision: str | None = None) -> bool:
    """Whether the files of a hub model must be read from the cache, because the hub does not answer.

    Args:
        model: a hub id.
        revision: the revision that will be loaded.

    Raises:
        SparsortError: the hub does not answer, and the model is not in the cache.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if constants.is_offline_mode() or constants.ENDPOINT in _REACHED:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except (
        Exception
    ) as error:  # the class depends on the HTTP library, which changes with the version of huggingface_hub
        try:
            cached_path = try_to_load_from_cache(model, "config.json", revision=revision)
        except HFValidationError:
            cached_path = None
        if isinstance(cached_path, str):
            return True
        raise SparsortError(
            f"the model {model!r} is not a folder, and the hub at {constants.ENDPOINT} cannot be reached to look for it there "
            f"({str(error).strip() or type(error).__name__}). Give a folder with config.json and weights, a .gguf file or "
            "'demo', or connect this machine to the network."
        ) from error
    _REACHED.add(constants.ENDPOINT)
    return False
