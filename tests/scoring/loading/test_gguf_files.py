"""A user's GGUF file: converted once, read from the cache from then on, and equal to the file bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.scoring.loading import conversions, gguf_files
from sparsort.scoring.loading import demo_model as embedded
from sparsort.scoring.loading import load as loading
from sparsort.scoring.loading.demo_model import load_tokenizer, quiet_transformers, resolve_model
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.prompts.prompt import hash_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="session")
def small_gguf(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, as llama.cpp writes it, in Q8_0."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write(path, model, tokenizer)
    return path


def _write(path: Path, model: Any, tokenizer: Any, template: str | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(definition["vocab"], key=definition["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in definition["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template is not None:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = _permuted(name, weight, config).float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Query and key projections in llama.cpp's order of rotary dimensions."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            return weight.view(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def conversions_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from the GGUF file itself: each costs minutes for a real one."""
    from transformers import AutoTokenizer

    made: list[str] = []
    read_weights, auto = loading._read_weights, AutoTokenizer.from_pretrained

    def weights(source: Any, options: dict[str, Any]) -> Any:
        if "gguf_file" in options:
            made.append(str(options["dtype"]))
        return read_weights(source, options)

    def tokenizer(source: Any, **options: Any) -> Any:
        if "gguf_file" in options:
            made.append("tokenizer")
        return auto(source, **options)

    monkeypatch.setattr(loading, "_read_weights", weights)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer)
    return made


def _states(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 20)[None], output_hidden_states=True).hidden_states[-1]


def test_the_second_load_reads_the_cache_and_gives_the_same_bits(
    small_gguf: Path, cache: Path, conversions_made: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(
            small_gguf.parent,
            gguf_file=small_gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()
    first = load_model(small_gguf, dtype="float32", device="cpu")
    assert sorted(conversions_made) == ["tokenizer", "torch.float32"]
    assert "Converting the float32 weights of tiny.gguf, once" in capfd.readouterr().err
    second = load_model(small_gguf, dtype="float32", device="cpu")
    assert len(conversions_made) == 2
    assert capfd.readouterr().err == ""
    for loaded in (first, second):
        weights = loaded.model.state_dict()
        assert weights.keys() == plain.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
        assert torch.equal(_states(loaded.model), _states(plain))
    assert (first.weights, first.tokenizer_hash) == (second.weights, second.tokenizer_hash)
    assert second.tokenizer("Question: 2 + 3?").input_ids == first.tokenizer("Question: 2 + 3?").input_ids
    assert hash_tokenizer(load_tokenizer(str(small_gguf))) == first.tokenizer_hash
    assert len(conversions_made) == 2


def test_scores_of_the_converted_file_keep_the_identity_of_the_gguf_file(small_gguf: Path, cache: Path) -> None:
    expected = hashlib.sha256(hashlib.sha256(small_gguf.read_bytes()).digest()).hexdigest()
    # As calibrations and score folders of earlier versions have it.
    assert load_model(small_gguf).weights == load_model(small_gguf).weights == f"sha256:{expected}"


def test_each_dtype_and_each_content_is_converted_by_itself(
    small_gguf: Path, cache: Path, conversions_made: list[str], tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        assert str(load_model(small_gguf, dtype=dtype).model.dtype) == f"torch.{dtype}"
    assert sorted(conversions_made) == ["tokenizer", "torch.bfloat16", "torch.float32"]
    # The same content under another name is the same file; another content under the same name is not.
    copied = tmp_path / "tiny.gguf"
    shutil.copy(small_gguf, copied)
    load_model(copied, dtype="float32")
    assert len(conversions_made) == 3
    before = load_model(copied, dtype="float32")
    content = bytearray(copied.read_bytes())
    content[-5] ^= 1
    copied.write_bytes(content)
    after = load_model(copied, dtype="float32")
    assert len(conversions_made) == 5
    assert before.weights != after.weights
    assert not all(
        torch.equal(weight, after.model.state_dict()[name]) for name, weight in before.model.state_dict().items()
    )


def test_a_damaged_conversion_is_made_again(
    small_gguf: Path, cache: Path, conversions_made: list[str], damages: Callable[[Path], Iterator[str]]
) -> None:
    first = load_model(small_gguf, dtype="float32")
    (path,) = cache.glob("*-float32-*/model.safetensors")
    count = len(conversions_made)
    for _ in _first_and_last(damages(path)):
        again = load_model(small_gguf, dtype="float32")
        count += 1
        assert len(conversions_made) == count
        assert torch.equal(_states(again.model), _states(first.model))


def _first_and_last(steps: Iterator[str]) -> Iterator[str]:
    """The first damage of a kind each: a flipped bit, and the file removed."""
    yield next(steps)
    for step in steps:
        if step == "removed":
            yield step


def test_a_model_larger_than_the_cache_or_the_disk_is_not_kept(
    small_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSORT_CACHE_MODELS_GB", "0.0001")
    load_model(small_gguf, dtype="float32")
    assert "SPARSORT_CACHE_MODELS_GB" in caplog.text
    assert [path.name.split("-")[1] for path in cache.iterdir()] == ["tokenizer"]
    monkeypatch.delenv("SPARSORT_CACHE_MODELS_GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000_000))
    assert conversions.no_room_for(1_300_000_000) == f"the converted model takes 1.3 GB, and {cache} has 1.2 GB free"
    assert conversions.no_room_for(1_100_000_000) is None


@pytest.mark.parametrize("limit", ["many", "-1", "nan"])
def test_a_limit_that_is_not_a_number_is_found_before_anything_is_converted(
    limit: str, small_gguf: Path, cache: Path, conversions_made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*_: Any) -> None:
        conversions_made.append("demo")

    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "need", lambda *_: None)
    load_model(small_gguf, dtype="float32")
    conversions_made.clear()
    held = sorted(cache.iterdir())
    monkeypatch.setenv("SPARSORT_CACHE_MODELS_GB", limit)
    sentence = f"^SPARSORT_CACHE_MODELS_GB is '{limit}'; expected a number of gigabytes, such as 20.$"
    for name in (str(small_gguf), "demo"):
        for load in (load_tokenizer, load_model):
            with pytest.raises(SparsortError, match=sentence):
                load(name)
    result = CliRunner().invoke(app, ["cache", "--clear"])
    assert result.exit_code == 2, result.output
    assert "SPARSORT_CACHE_MODELS_GB" in result.output
    assert not conversions_made
    assert sorted(cache.iterdir()) == held


def _with_bigrams(folder: Path, source: Path) -> None:
    """A tokenizer.json that merges less than the GGUF's."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("first", ["alone", "among"])
def test_tokenizer_files_in_the_folder_decide_for_that_folder_alone(
    first: str,
    small_gguf: Path,
    cache: Path,
    conversions_made: list[str],
    tmp_path: Path,
    make_tiny_model: Callable[..., Path],
) -> None:
    from transformers import AutoTokenizer

    files = {name: tmp_path / name / "tiny.gguf" for name in ("alone", "among")}
    for file in files.values():
        file.parent.mkdir()
        shutil.copy(small_gguf, file)
    _with_bigrams(files["among"].parent, make_tiny_model("llama"))
    with quiet_transformers():
        expected = {
            name: AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name) for name, file in files.items()
        }
    text = "Question: how many apples are there?"
    facts = {name: each(text).input_ids for name, each in expected.items()}
    assert facts["alone"] != facts["among"]
    conversions_made.clear()
    for name in (first, "alone", "among", "alone"):
        assert load_tokenizer(str(files[name]))(text).input_ids == facts[name]
    assert conversions_made == ["tokenizer", "tokenizer"]
    # Another file changes nothing, and a changed one is read again.
    (files["among"].parent / "README.md").write_text("A model.")
    load_tokenizer(str(files["among"]))
    assert len(conversions_made) == 2
    (files["among"].parent / "tokenizer.json").unlink()
    assert load_tokenizer(str(files["among"]))(text).input_ids == facts["alone"]


def test_a_template_that_is_lost_when_it_is_saved_is_not_kept(
    make_tiny_model: Callable[..., Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

    folder, file = make_tiny_model("llama"), tmp_path / "tiny.gguf"
    template = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    _write(file, AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder)), template)
    save = PreTrainedTokenizerBase.save_pretrained

    def without_template(self: Any, folder: Path, **options: Any) -> Any:
        saved = save(self, folder, **options)
        (folder / "chat_template.jinja").unlink()
        return saved

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", without_template)
    assert load_tokenizer(str(file)).chat_template == template
    assert "is different after it has been saved" in caplog.text
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_result(
    small_gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file")
    loaded = load_model(small_gguf, dtype="float32")
    assert torch.isfinite(_states(loaded.model)).all()
    assert "is converted again in every call" in caplog.text


def test_of_several_that_begin_at_once_one_converts(tmp_path: Path, cache: Path) -> None:
    # A lock is of an open file: threads that open it are as apart as processes are.
    file = tmp_path / "x.gguf"
    file.write_bytes(b"content")
    began: list[int] = []
    together = threading.Barrier(4)

    def convert() -> str:
        began.append(1)
        return "converted"

    def read(_number: int) -> str:
        together.wait()
        return gguf_files.through_cache(
            file,
            "words",
            convert=convert,
            save=lambda value, folder: (folder / "words").write_text(value),
            load=lambda folder: (folder / "words").read_text(),
        )

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(4))) == {"converted"}
    assert len(began) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_folder_with_one_gguf_file_is_kept_too(small_gguf: Path, cache: Path, conversions_made: list[str]) -> None:
    assert resolve_model(str(small_gguf.parent)).gguf_file == "tiny.gguf"
    load_model(small_gguf.parent, dtype="float32")
    load_model(small_gguf, dtype="float32")
    assert len(conversions_made) == 2


def test_a_tokenizer_that_is_not_the_same_once_saved_is_not_kept(
    small_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = iter("ab")
    monkeypatch.setattr("sparsort.scoring.prompts.prompt.hash_tokenizer", lambda tokenizer: next(hashes))
    assert len(load_tokenizer(str(small_gguf)))
    assert "is different after it has been saved" in caplog.text
    assert not list(cache.iterdir())


def test_a_broken_gguf_file_is_an_error(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SparsortError, match=r"cannot load the tokenizer .*broken\.gguf"):
        load_model(path)
    assert not list(cache.glob("*"))


def test_the_digest_of_a_file_is_that_of_its_present_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    for number in range(5):
        path.write_bytes(bytes([number]))
        seen.add(gguf_files.sha256_of(path))
    assert len(seen) == 5
