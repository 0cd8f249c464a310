"""Loads a causal language model and its tokenizer, and identifies them.

Contract: the model is any causal language model of transformers, by hub id, folder, GGUF file or the name `demo`, or as an
object. Every failure that a user can cause is a `SparsortError` that names the model. Weights are identified by the SHA-256 of
their files or by the commit on the hub, and tokenizers by the SHA-256 of their definition, so that scores of different models
are never confused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsort.errors import SparsortError, first_line, unknown_choice
from sparsort.extras import need
from sparsort.kernels.backend import Decision, compute_dtype, default_device, use_device
from sparsort.scoring.loading.demo_model import (
    ADAPTER,
    EXPECTED_MODELS,
    ResolvedModel,
    hint_at,
    load_tokenizer,
    quiet_transformers,
    resolve_model,
)
from sparsort.scoring.loading.dtypes import DTYPES
from sparsort.scoring.loading.gguf_files import make_plain, sha256_of, through_cache
from sparsort.scoring.loading.hub import cached_only
from sparsort.scoring.prompts.prompt import hash_tokenizer

# If one of these files exists, transformers does not read pickled weights.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
# Keys of a configuration that do not change the results of the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "architectures")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run, with its origin and with the reasons for its device and dtype."""

    name: str
    model: Any
    tokenizer: Any
    device: Decision[torch.device]
    dtype: Decision[torch.dtype]
    weights: str
    # Without the chat template, which `prompts.identify_tokenizer` includes if it is used.
    tokenizer_hash: str


def load_model(
    model: Any = "demo",
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load `model` for inference.

    Args:
        model: hub id, folder (of a model, or of an adapter of PEFT), `.gguf` file, "demo", or a transformers model (then
            `tokenizer` is required).
        tokenizer: a transformers tokenizer; None for that of the model.
        dtype: "auto" (bf16 if the processor has it, otherwise fp32), or the name of a torch dtype.
        device: "auto", "cpu", "cuda", "cuda:1", …
        revision: hub revision.
        trust_remote_code: run code that comes with the model.

    Raises:
        SparsortError: there is no such model, the folder has none, the dtype or device is unknown, or weights are missing.
    """
    check_dtype(dtype)
    run_device, run_dtype = _device_and_dtype(device, dtype)
    if not isinstance(model, (str, Path)):
        return _adopt(model, tokenizer)
    resolved = resolve_model(str(model))
    options: dict[str, Any] = {"dtype": run_dtype.value, "revision": revision, "trust_remote_code": trust_remote_code}
    if resolved.is_hub_id:
        options["local_files_only"] = cached_only(resolved.folder_or_id, revision=revision)
    # The tokenizer is loaded first, because it is small, and a model without one cannot be used.
    tokenizer = tokenizer or load_tokenizer(str(model), revision=revision, trust_remote_code=trust_remote_code)
    loaded = _read_model(str(model), resolved, run_device.value, options)
    return LoadedModel(
        name=str(model),
        model=loaded,
        tokenizer=tokenizer,
        device=run_device,
        dtype=run_dtype,
        weights=_hash_weights(resolved.folder_or_id, resolved.gguf_file, loaded),
        tokenizer_hash=hash_tokenizer(tokenizer),
    )


def _read_model(name: str, resolved: ResolvedModel, device: torch.device, options: dict[str, Any]) -> Any:
    """Read a named model, or raise a `SparsortError` if that fails or the checkpoint lacks weights."""
    if (Path(resolved.folder_or_id) / ADAPTER).is_file():
        need("peft", "peft", "reading an adapter")
    try:
        if resolved.gguf_file:
            loaded, info = _read_gguf(Path(resolved.folder_or_id) / resolved.gguf_file, options)
        else:
            loaded, info = _read_weights(resolved.folder_or_id, options)
        loaded = loaded.to(device).eval()
    except SparsortError:
        raise
    except Exception as error:  # the configuration selects the class that is built, which can raise any error
        raise SparsortError(
            f"cannot load the model {name!r}: {first_line(error)}{hint_at(name, error)} {EXPECTED_MODELS}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills missing weights with random numbers, and the scores would look like any others.
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SparsortError(
            f"the checkpoint {name!r} lacks weights: {', '.join(missing[:3])}{more}. Copy or download all of it again."
        )
    return loaded


def _read_weights(folder_or_id: str | Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and the information of transformers about loading it."""
    from transformers import AutoModelForCausalLM

    # transformers draws random numbers for missing weights, which must not change the state of the caller's generator.
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder_or_id, output_loading_info=True, **options)
    return loaded, info


def _read_gguf(file: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a GGUF file, dequantised to the dtype in the options."""

    def convert() -> tuple[Any, dict[str, Any]]:
        from transformers import GgufConfig

        gguf_options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        loaded, info = _read_weights(file.parent, {**options, **gguf_options})
        make_plain(loaded)
        return loaded, info

    def save(model_and_info: tuple[Any, dict[str, Any]], folder: Path) -> None:
        if model_and_info[1]["missing_keys"]:
            raise SparsortError("it lacks weights.")
        with quiet_transformers():
            model_and_info[0].save_pretrained(folder)

    model_and_info: tuple[Any, dict[str, Any]] = through_cache(
        file,
        str(options["dtype"]).removeprefix("torch."),
        convert=convert,
        save=save,
        load=lambda folder: _read_weights(folder, options),
        size=lambda converted: sum(weight.nbytes for weight in converted[0].parameters()),
    )
    return model_and_info


def _device_and_dtype(device: str, dtype: str) -> tuple[Decision[torch.device], Decision[torch.dtype]]:
    """The device and dtype to run on, or a `SparsortError` if there is no such device or it does not have the dtype."""
    try:
        run_device = default_device() if device == "auto" else Decision(torch.device(device), "asked for")
        # torch reports a missing device or dtype only when it allocates a tensor.
        torch.empty(0, device=run_device.value)
    except (RuntimeError, AssertionError) as error:
        first = first_line(error).rstrip(".")
        raise SparsortError(f"cannot use the device {device!r}: {first}. {use_device()}") from None
    run_dtype = compute_dtype(run_device.value) if dtype == "auto" else Decision(_DTYPES[dtype], "asked for")
    try:
        torch.empty(0, device=run_device.value, dtype=run_dtype.value)
    except (RuntimeError, TypeError) as error:
        first = first_line(error).rstrip(".")
        raise SparsortError(
            f"cannot compute in {dtype} on the device {str(run_device.value)!r}: {first}. Use dtype='auto' (--dtype auto)."
        ) from None
    return run_device, run_dtype


def check_dtype(dtype: str) -> None:
    """Refuse a name that is neither "auto" nor that of a dtype."""
    if dtype != "auto" and dtype not in _DTYPES:
        raise unknown_choice("dtype", dtype, ("auto", *_DTYPES))


def _adopt(model: Any, tokenizer: Any) -> LoadedModel:
    if not isinstance(model, torch.nn.Module):
        raise SparsortError(
            f"model is {model!r}; expected a hub id, a folder, a .gguf file, 'demo' or a transformers model."
        )
    if tokenizer is None:
        raise SparsortError("a model object needs its tokenizer: pass tokenizer=….")
    weight = next(model.parameters())
    return LoadedModel(
        name=str(getattr(model, "name_or_path", "") or type(model).__name__),
        model=model.eval(),
        tokenizer=tokenizer,
        device=Decision(weight.device, "the model object's own"),
        dtype=Decision(weight.dtype, "the model object's own"),
        weights=_hash_parameters(model),
        tokenizer_hash=hash_tokenizer(tokenizer),
    )


def _hash_weights(folder_or_id: str, gguf_file: str | None, model: Any) -> str:
    folder = Path(folder_or_id)
    if not folder.is_dir():
        commit = getattr(model.config, "_commit_hash", None)
        return f"hub:{folder_or_id}@{commit}" if commit else _hash_parameters(model)
    if (folder / ADAPTER).is_file():
        # The weights of the base model, which the results depend on too, are elsewhere.
        return _hash_parameters(model)
    files = [folder / gguf_file] if gguf_file else _weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        digest.update(sha256_of(path))
    # The configuration changes the results as well, for example through the scale of rotary embeddings.
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers may read."""
    files = sorted(folder.glob("*.safetensors"))
    # transformers looks for these names first, and reads pickled weights only if it finds neither.
    if not any((folder / name).is_file() for name in _SAFETENSORS):
        files += sorted(folder.glob("*.bin"))
    return files


def _hash_parameters(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # NumPy has no bfloat16, so the bytes are hashed. A 0-dimensional tensor cannot be viewed as bytes until it is reshaped.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return f"sha256:{digest.hexdigest()}"
