"""Shared fixtures: tiny models created on demand, the embedded model, and a guard on global random state.

The environment is set before anything imports torch or Triton, which read it once: no test reaches the network, and
without a GPU the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import rich.style  # noqa: F401  it draws from the global random state once, at its import
from forks import ForkServer

# Test machines are shared and sometimes slow, so the duration of a test does not show a fault.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background jobs of a shell without job control
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test may find rows that another test has read. Tests of the cache set their own limit and folder.
os.environ["SPARSORT_CACHE_ROWS_GB"] = "0"
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

_TEXT = """A question has an answer. How many apples are left when two of seven apples are eaten? The answer is five.
Question: What is 2 + 3? Answer: 5. Review: The screen is bright and the battery lasts. Label: positive.
Problem: A train leaves at 9:40 and arrives at 11:05. Solution: It travels for 85 minutes, which is an hour and 25.
Sparse states, dense states; 0 1 2 3 4 5 6 7 8 9 10 20 30 100 1000. Paris is the capital of France, Rome of Italy."""
# Arabic letter mark and the directional marks, embeddings, overrides and isolates.
_DIRECTIONS = {"RLE", "LRE", "RLO", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"}
_MARKS = {"\u061c", "\u200e", "\u200f"}
_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16}
_OPT: dict[str, Any] = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
# family -> (transformers' model type, its configuration); the vocabulary's size and special ids come from the tokenizer
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "gpt_neox": ("gpt_neox", _SMALL),
    "opt": ("opt", _OPT),
    "no_norm": ("opt", {**_OPT, "_remove_final_layer_norm": True}),
}


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_model(family, **overrides) -> folder`: a causal model with random weights and a byte-level tokenizer.

    Families: llama, qwen3, gemma3 (window of 8), gpt2, gpt_neox, opt, no_norm (no final norm). Overrides go into the
    configuration. Folders are shared by the session: copy one before changing it.
    """
    folders: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp(family)
            _save_tiny_model(folder, family, overrides)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the embedded model, converted into the user's cache where it is not there yet."""
    from sparsort.errors import SparsortError
    from sparsort.scoring.loading.demo_model import demo_folder

    try:
        return demo_folder()
    except SparsortError as error:
        pytest.fail(f"the tests need the extra 'dev', which holds the embedded model: {error}", pytrace=False)


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Runs programs that need torch in processes of their own, without importing it in each."""
    with ForkServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _global_random_state_is_left_alone() -> Iterator[None]:
    """Fail a test that moves the global generators of `random`, NumPy or torch, and put them back for the next one."""
    before = _random_states()
    yield
    after = _random_states()
    moved = [name for name, (state, _restore) in before.items() if after[name][0] != state]
    for name in moved:
        before[name][1]()
    if moved:
        pytest.fail(
            f"the test moved the global random state of {', '.join(moved)}: use a generator of its own.", pytrace=False
        )


def _random_states() -> dict[str, tuple[Any, Callable[[], None]]]:
    python = random.getstate()
    states: dict[str, tuple[Any, Callable[[], None]]] = {"random": (python, lambda: random.setstate(python))}
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = legacy = numpy.random.get_state()
        states["numpy"] = ((kind, keys.tobytes(), *rest), lambda: numpy.random.set_state(legacy))
    if torch := sys.modules.get("torch"):
        tensor = torch.get_rng_state()
        states["torch"] = (tensor.numpy().tobytes(), lambda: torch.set_rng_state(tensor))
    return states


def _save_tiny_model(folder: Path, family: str, overrides: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsort.scoring.loading.demo_model import quiet_transformers

    tokenizer = _tiny_tokenizer()
    model_type, options = _FAMILIES[family]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **options, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Norms start at exactly 1 (or 0). Then states before and after the norm would differ in their scale only.
            for weight in model.parameters():
                weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT.splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


@pytest.fixture
def damages() -> Callable[[Path], Iterator[str]]:
    """Damages a file in several ways in turn, names each way, and restores the file.

    One bit is flipped at both ends, in the header that most formats have, and in eight places over the whole file. The file is
    cut to nothing, to its half, and by its last byte. Finally it is removed.
    """

    def each(path: Path) -> Iterator[str]:
        whole = path.read_bytes()
        n = len(whole)
        places = {0, 1, 7, 9, 40, n - 1, n - 3, *(n * part // 9 for part in range(1, 9))}
        try:
            for number, place in enumerate(sorted(place for place in places if 0 <= place < n)):
                bit = (3 * number) % 8
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                yield f"bit {bit} of byte {place} of {n} flipped"
            for length in sorted({0, n // 2, max(0, n - 1)} - {n}):
                path.write_bytes(whole[:length])
                yield f"cut to {length} of {n} bytes"
            path.unlink()
            yield "removed"
        finally:
            path.write_bytes(whole)

    return each


@pytest.fixture(scope="session")
def is_printed_safely() -> Callable[[str], bool]:
    """Whether a text has no control character but the newline, and no mark of direction, by Unicode's own tables."""

    def is_safe(written: str) -> bool:
        return all(
            character == "\n"
            or (
                unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
                and unicodedata.bidirectional(character) not in _DIRECTIONS
                and character not in _MARKS
            )
            for character in written
        )

    return is_safe
