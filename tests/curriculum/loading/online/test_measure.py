"""Measurements of a training pass: values against states that were read in another way, and passes that do not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsort.curriculum.loading.loader.packing import PackedCollator, pack
from sparsort.curriculum.loading.online.measure import OnlineDifficulty
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref

B, T = 4, 12
ROWS = np.array([40, 7, 19, 3])


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    from sparsort.scoring.loading.demo_model import quiet_transformers

    with quiet_transformers():
        yield AutoModelForCausalLM.from_pretrained(make_tiny_model("llama")).train()


def some_ids(b: int = B, t: int = T) -> Tensor:
    return torch.randint(3, 300, (b, t), generator=torch.Generator().manual_seed(5))


def values_of(states_NH: Tensor, metric: str = "hoyer") -> list[float]:
    return sparsity_rows_ref(states_NH.detach()).values_NM[:, METRIC_NAMES.index(metric)].double().tolist()


def measured(model: Any, batch: dict[str, Any], rows: Any = ROWS, **options: Any) -> tuple[Observations, Tensor]:
    """What is observed of one training pass, and the last hidden states as transformers returns them."""
    with OnlineDifficulty(**options).attach(model) as online:
        online.begin()
        output = model(**batch, output_hidden_states=True)
        online.collect(rows, 3)
        return online.drain(), output.hidden_states[-1]


# Values


@pytest.mark.parametrize("side", ["right", "left", "labels", "none"])
def test_the_value_is_that_of_the_last_token(model: Any, side: str) -> None:
    lengths = [12, 5, 1, 9]
    shown = torch.zeros((B, T), dtype=torch.int64)
    last = []
    for b, length in enumerate(lengths):
        span = slice(T - length, T) if side == "left" else slice(0, length)
        shown[b, span] = 1
        last.append(T - 1 if side in ("left", "none") else length - 1)
    batch: dict[str, Any] = {"input_ids": some_ids()}
    if side == "labels":
        batch["labels"] = torch.where(shown == 1, batch["input_ids"], -100)
    elif side != "none":
        batch["attention_mask"] = shown
    found, states = measured(model, batch)
    assert found.rows.tolist() == ROWS.tolist()
    assert found.steps.tolist() == [3] * B
    assert found.values.tolist() == values_of(states[torch.arange(B), last])


def test_the_mean_is_over_tokens_spread_evenly(model: Any) -> None:
    lengths = [12, 5, 3, 4]
    shown = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    # Of 12 tokens in 4 pieces of 3 the middle ones; of 5 the tokens in which the middles of 4 pieces lie; 3 and 4 whole.
    places = [[1, 4, 7, 10], [0, 1, 3, 4], [0, 1, 2], [0, 1, 2, 3]]
    found, states = measured(
        model, {"input_ids": some_ids(), "attention_mask": shown}, tokens="mean", per_sequence=4, metric="gini"
    )
    expected = [np.mean(values_of(states[b, places[b]], "gini")) for b in range(B)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    everything, states = measured(model, {"input_ids": some_ids()}, tokens="mean", per_sequence=100)
    np.testing.assert_allclose(everything.values, [np.mean(values_of(states[b])) for b in range(B)], rtol=1e-6)


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_higher_is_harder_whatever_the_metric(metric: str) -> None:
    flat, spiked = torch.full((16,), 0.5) + torch.arange(16) / 100, torch.zeros(16)
    spiked[3] = 3.0
    if metric == "l0_relative":
        # This metric counts the outliers of the spread, and a single spike has one.
        flat = torch.cat([torch.zeros(12), torch.ones(4)])
    toy = Toy(torch.stack([flat, spiked]))
    found, _ = measured(toy, {"input_ids": torch.tensor([[0], [1]])}, [0, 1], metric=metric)
    if metric == "l0_absolute":
        toy.embedding.weight.data[0] *= 10
        found, _ = measured(toy, {"input_ids": torch.tensor([[0], [1]])}, [0, 1], metric=metric)
    assert found.values[0] < found.values[1]


class Toy(nn.Module):
    """A language model whose head reads rows of a table as they are."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.head = nn.Identity()
        self.fused = False

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        states = self.embedding(input_ids)
        return SimpleNamespace(logits=states if self.fused else self.head(states), hidden_states=[states])


def test_a_packed_example_is_measured_at_its_own_last_token(model: Any) -> None:
    ids = some_ids(6, 9)
    documents = [{"input_ids": ids[n, :length].tolist()} for n, length in enumerate([4, 4, 1, 9, 2, 7])]
    batch = PackedCollator()([pack(documents[:3]), pack(documents[3:4]), pack(documents[4:])])
    found, states = measured(model, batch, range(10, 16))
    assert found.rows.tolist() == list(range(10, 16))
    ends = [(0, 3), (0, 7), (0, 8), (1, 8), (2, 1), (2, 8)]
    assert found.values.tolist() == values_of(torch.stack([states[b, t] for b, t in ends]))
    alone = [measured(model, {"input_ids": torch.tensor([document["input_ids"]])}, [0])[0] for document in documents]
    np.testing.assert_allclose(found.values, [value for one in alone for value in one.values], rtol=1e-4)


@pytest.mark.parametrize("hidden", [True, False])
def test_padding_of_packed_sequences_is_no_example(model: Any, hidden: bool) -> None:
    ids = some_ids(5, 9)
    documents = [{"input_ids": ids[n, :length].tolist()} for n, length in enumerate([4, 1, 3, 2, 3])]
    batch = PackedCollator()([pack(documents[:3]), pack(documents[3:])])
    if hidden:
        batch["attention_mask"] = (batch["labels"] != -100) | (torch.arange(8) < torch.tensor([[8], [5]]))
    found, states = measured(model, batch, range(5), tokens="last")
    ends = [(0, 3), (0, 4), (0, 7), (1, 1), (1, 4)]
    assert found.values.tolist() == values_of(torch.stack([states[b, t] for b, t in ends]))
    means, states = measured(model, batch, range(5), tokens="mean", per_sequence=2)
    assert means.values[2] == pytest.approx(np.mean(values_of(states[0, [5, 7]])))


def test_a_packed_micro_batch_that_does_not_fit_its_rows_gives_nothing(model: Any) -> None:
    ids = some_ids(1, 8)
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])}
    with OnlineDifficulty().attach(model) as online:
        for rows in ([1, 2, 3], [4, 5]):
            online.begin()
            model(**batch)
            online.collect(rows, 0)
        assert online.drain().rows.tolist() == [1, 2, 3]
        online.begin()
        model(**batch)
        online.collect([4, 5], 1)
        with pytest.raises(SparsortError, match="no packed micro-batch contained as many examples"):
            online.drain()


def test_states_without_a_value_are_skipped() -> None:
    table = torch.rand((5, 8), generator=torch.Generator().manual_seed(0))
    table[1], table[2, 3] = 0.0, torch.nan
    found, _ = measured(Toy(table), {"input_ids": torch.tensor([[0], [1], [2], [3]])})
    assert found.rows.tolist() == [40, 3]
    hidden = torch.tensor([[1], [0]])
    found, _ = measured(Toy(table), {"input_ids": torch.tensor([[0], [3]]), "attention_mask": hidden}, [8, 9])
    assert found.rows.tolist() == [8]


# What counts, and what it leaves alone


def test_only_the_first_training_pass_between_begin_and_collect_counts(model: Any) -> None:
    first, other = some_ids(), some_ids() + 1
    alone, _ = measured(model, {"input_ids": first})
    online = OnlineDifficulty().attach(model)
    model(input_ids=other)
    online.begin()
    with torch.no_grad():
        model(input_ids=other)
    model.eval()
    model(input_ids=other)
    model.train()
    model(first)
    model(input_ids=other)
    online.collect(ROWS, 3)
    model(input_ids=other)
    assert online.drain().values.tolist() == alone.values.tolist()
    assert len(online.drain()) == 0
    online.close()


def test_training_is_bitwise_the_same_and_the_hooks_go_away(model: Any) -> None:
    ids = some_ids()

    def gradients() -> list[bytes]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach().numpy().tobytes(), *(weight.grad.numpy().tobytes() for weight in model.parameters())]

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    before, count = gradients(), hooks()
    with OnlineDifficulty(tokens="mean").attach(model) as online:
        online.begin()
        assert gradients() == before
        online.collect(ROWS, 0)
        assert not online._values[0].requires_grad
        assert hooks() > count
    assert gradients() == before
    assert hooks() == count
    assert len(online.drain()) == B


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model: Any, reentrant: bool) -> None:
    ids = some_ids()
    plain, _ = measured(model, {"input_ids": ids})
    # The name that it has from transformers 5.23 on.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    with OnlineDifficulty().attach(model) as online:
        online.begin()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        online.collect(ROWS, 3)
        np.testing.assert_allclose(online.drain().values, plain.values, rtol=1e-6)


def test_it_works_under_autocast(model: Any) -> None:
    ids = some_ids()
    plain, _ = measured(model, {"input_ids": ids})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, states = measured(model, {"input_ids": ids})
    assert found.values.tolist() == values_of(states[:, -1])
    np.testing.assert_allclose(found.values, plain.values, atol=0.02)


@pytest.mark.parametrize("wrap", ["module", "get_base_model", "_orig_mod"])
def test_wrapped_models_are_unwrapped(model: Any, wrap: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if wrap == "get_base_model":
                self.inner = model
            else:
                setattr(self, wrap, model)

        def forward(self, **batch: Any) -> Any:
            return model(**batch)

    if wrap == "get_base_model":
        Wrapper.get_base_model = lambda self: self.inner  # type: ignore[attr-defined]
    ids = some_ids()
    expected, _ = measured(model, {"input_ids": ids})
    found, _ = measured(Wrapper().train(), {"input_ids": ids})
    assert found.values.tolist() == expected.values.tolist()


def test_nothing_is_read_back_from_the_device_before_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from sparsort.curriculum.loading.online import measure as module

    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # What waits for a GPU: a number for the host, or a result whose size is not known before.
            assert not any(name in str(func) for name in ("_local_scalar_dense", "aten.nonzero.", "masked_select")), (
                func
            )
            return func(*args, **(kwargs or {}))

    # The CPU's reference looks whether any row is bad; the GPU's kernel does not.
    fake = SimpleNamespace(values_NM=torch.ones(5, len(METRIC_NAMES)))
    monkeypatch.setattr(module, "sparsity_rows", lambda *_args, **_options: fake)
    toy = Toy(torch.rand((5, 8), generator=torch.Generator().manual_seed(0)))
    with OnlineDifficulty().attach(toy) as online:
        for rows, positions in (([1], None), ([1, 2, 3], torch.tensor([[0, 1, 0, 0, 1]]))):
            fake.values_NM = torch.ones(len(rows), len(METRIC_NAMES))
            online.begin()
            toy(input_ids=torch.zeros((1, 5), dtype=torch.int64))
            with NoReadBack():
                online.collect(rows, 0, position_ids=positions)
        assert online.drain().rows.tolist() == [1, 1, 2, 3]


def test_many_micro_batches_are_kept_in_order() -> None:
    toy = Toy(torch.rand((50, 8), generator=torch.Generator().manual_seed(0)))
    expected = []
    with OnlineDifficulty().attach(toy) as online:
        for step in range(600):
            online.begin()
            states = toy(input_ids=torch.tensor([[step % 50]])).hidden_states[0]
            online.collect([step], step)
            expected += values_of(states[:, -1])
        found = online.drain()
    assert found.rows.tolist() == found.steps.tolist() == list(range(600))
    assert found.values.tolist() == expected


# What is refused


def test_a_measurement_that_is_not_possible_is_refused_with_the_reason(model: Any) -> None:
    with pytest.raises(SparsortError, match="Did you mean 'hoyer'"):
        OnlineDifficulty(metric="hoyar")
    with pytest.raises(SparsortError, match="unknown choice of tokens 'first'"):
        OnlineDifficulty(tokens="first")  # type: ignore[arg-type]
    with pytest.raises(SparsortError, match="per_sequence is 0"):
        OnlineDifficulty(per_sequence=0)
    with pytest.raises(SparsortError, match="has no output embeddings"):
        OnlineDifficulty().attach(model.model)
    with pytest.raises(SparsortError, match="not attached"):
        OnlineDifficulty().begin()
    online = OnlineDifficulty().attach(model)
    with pytest.raises(SparsortError, match="already attached"):
        online.attach(model)
    with pytest.raises(SparsortError, match="without begin"):
        online.collect(ROWS, 0)
    online.begin()
    model.eval()(input_ids=some_ids())
    with pytest.raises(SparsortError, match="evaluation mode"):
        online.collect(ROWS, 0)
    model.train()
    online.begin()
    model(input_ids=some_ids())
    with pytest.raises(SparsortError, match="9 rows were given for 4 sequences"):
        online.collect(range(9), 0)
    online.begin()
    model(input_ids=some_ids(), attention_mask=torch.ones((B, T)), logits_to_keep=1)
    with pytest.raises(SparsortError, match=r"attention_mask has shape \(4, 12\).*4 sequences of 1 tokens"):
        online.collect(ROWS, 0)
    online.close()
    toy = Toy(torch.rand((5, 8), generator=torch.Generator().manual_seed(0)))
    toy.fused = True
    online.attach(toy).begin()
    toy(input_ids=torch.tensor([[1]]))
    with pytest.raises(SparsortError, match=r"did not call its output embeddings.*Liger"):
        online.collect([0], 0)
