"""Packed sequences: their parts, their padding, and that a model sees each document as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.loader.packing import PackedCollator, cut, pack
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

LENGTHS = [5, 1, 9, 3, 3, 12, 2, 7, 1, 1, 4, 6, 8, 2, 10, 3, 5]


def documents() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(3, 300, length).tolist(), "text": "not packed"} for length in LENGTHS]


def planned(**options: Any) -> Any:
    chosen = {"batch_size": 3, "packing": "next_fit", "pack_length": 16, **options}
    return plan_curriculum(np.arange(len(LENGTHS)) % 5, lengths=LENGTHS, **chosen)


def flat(batches: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(batches))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_packed_sequence_can_be_taken_apart_again(given_ids: list[list[int]]) -> None:
    packed = pack([{"input_ids": ids} for ids in given_ids])
    starts = [place for place, position in enumerate(packed["position_ids"]) if position == 0]
    ends = [*starts[1:], len(packed["input_ids"])]
    assert [packed["input_ids"][a:b] for a, b in zip(starts, ends, strict=True)] == given_ids
    assert [packed["position_ids"][a:b] for a, b in zip(starts, ends, strict=True)] == [
        list(range(len(ids))) for ids in given_ids
    ]
    assert [packed["labels"][a:b] for a, b in zip(starts, ends, strict=True)] == [[-100, *ids[1:]] for ids in given_ids]


def test_labels_of_the_examples_are_kept_whatever_holds_them() -> None:
    first = {"input_ids": torch.tensor([5, 6, 7]), "labels": np.array([-100, -100, 7]), "attention_mask": [1, 1, 1]}
    packed = pack([first, {"input_ids": (8, 9), "labels": None}])
    assert packed == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, -100, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a", "label": 1}, r"no input_ids \(it has columns text, label\)"),
        ([1, 2], r"no input_ids \(it has list\)"),
        ({"input_ids": [1, 0], "attention_mask": [1, 0]}, "without padding"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels"),
    ],
)
def test_what_cannot_be_packed_is_refused(example: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        pack([example])


def test_a_batch_is_padded_to_its_longest() -> None:
    batch = PackedCollator(pad_token_id=7)(
        [pack([{"input_ids": [1, 2]}, {"input_ids": [3]}]), pack([{"input_ids": [4]}])]
    )
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch["input_ids"].dtype == torch.int64


def test_the_cut_shortens_token_fields_and_nothing_else() -> None:
    example = {
        "input_ids": [1, 2, 3],
        "labels": torch.tensor([1, 2, 3]),
        "attention_mask": [1, 1],
        "text": "abc",
        "label": 3,
    }
    shorter = cut(example, 2)
    assert shorter["labels"].tolist() == [1, 2]
    assert {name: value for name, value in shorter.items() if name != "labels"} == {
        "input_ids": [1, 2],
        "attention_mask": [1, 1],
        "text": "abc",
        "label": 3,
    }
    assert cut({"labels": 2, "input_ids": [1]}, 1) == {"labels": 2, "input_ids": [1]}
    assert cut("abc", 1) == "abc"
    assert len(example["input_ids"]) == 3


# In the loader


@pytest.mark.parametrize("packing", ["next_fit", "best_fit"])
@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (1, 2)])
def test_each_document_is_in_one_packed_sequence_in_the_plans_order(
    packing: str, world_size: int, micro_batches: int
) -> None:
    plan, data = planned(packing=packing), documents()
    split = {"world_size": world_size, "micro_batches": micro_batches, "collate_fn": list}
    for epoch in range(2):
        ranks = []
        for rank in range(world_size):
            loader = CurriculumLoader(plan, data, rank=rank, verify=False, **split)
            loader.set_epoch(epoch)
            ranks.append(list(loader))
        for number in range(plan.n_batches):
            begin = number * micro_batches
            mine = [flat(batches[begin : begin + micro_batches]) for batches in ranks]
            whole = [mine[place % world_size][place // world_size] for place in range(sum(map(len, mine)))]
            assert whole == [pack([data[row] for row in rows]) for rows in plan.bins(number, epoch)]
        held = [row for number in range(plan.n_batches) for row in plan.batch(number, epoch).tolist()]
        assert sorted(held) == list(range(len(LENGTHS)))


def test_the_rows_of_a_packed_batch_are_reported_in_order() -> None:
    plan, data = planned(), documents()
    loader = CurriculumLoader(plan, data, rank=1, world_size=2, verify=False)
    for number, batch in enumerate(loader):
        bins = plan.bins(number)[1::2]
        assert loader.rows.tolist() == [row for rows in bins for row in rows]
        assert batch["input_ids"].shape == (len(bins), max(sum(LENGTHS[row] for row in rows) for rows in bins))
        assert int((batch["input_ids"] != 0).sum()) == sum(LENGTHS[row] for row in loader.rows)


@pytest.mark.parametrize("options", [{}, {"packing": "none", "pack_length": None}])
def test_examples_are_cut_at_the_plans_maximum_length(options: dict[str, Any]) -> None:
    plan, data = planned(max_length=4, **options), documents()
    seen = 0
    for batch in CurriculumLoader(plan, data, collate_fn=list, verify=False):
        for sequence in batch:
            assert len(sequence["input_ids"]) <= (16 if plan.settings.packing != "none" else 4)
            seen += len(sequence["input_ids"])
    assert seen == sum(min(4, length) for length in LENGTHS) < sum(LENGTHS)


def test_no_packed_sequence_is_longer_than_planned() -> None:
    sequences = flat(CurriculumLoader(planned(), documents(), collate_fn=list, verify=False))
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    assert max(lengths) <= 16
    assert sum(lengths) == sum(LENGTHS)


@pytest.mark.parametrize(
    "options", [{}, {"packing": "none", "pack_length": None, "batch_size": None, "token_budget": 40}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_row_with_more_tokens_than_the_plan_counted_is_an_error(options: dict[str, Any], stream: bool) -> None:
    chosen = {"batch_size": 3, "packing": "next_fit", "pack_length": 16, "schedule": "as_given", **options}
    given_to_plan = {name: value for name, value in chosen.items() if value is not None}
    plan = plan_curriculum(np.zeros(len(LENGTHS)), lengths=LENGTHS, **given_to_plan)
    data = documents()
    data[5]["input_ids"].append(4)

    class Stream:
        def __iter__(self) -> Any:
            return iter(data)

    with pytest.raises(SparsortError, match="row 5 has 13 tokens and the plan counted 12"):
        list(CurriculumLoader(plan, Stream() if stream else data, collate_fn=list, verify=False))


# In a model


def _model(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    from sparsort.scoring.loading.demo_model import quiet_transformers

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def _token_losses(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="none"
    )
    return losses.view(labels_BL.shape[0], -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_losses_are_those_of_the_documents_alone(
    family: str, attention: str, make_tiny_model: Callable[..., Path]
) -> None:
    model, data, plan = _model(make_tiny_model(family), attention), documents(), planned()
    assert model.config.use_cache, "the setting under which a cache would hide the documents' borders"
    padded = False
    with torch.no_grad():
        alone = {}
        for row, document in enumerate(data):
            ids = torch.tensor([document["input_ids"]])
            alone[row] = _token_losses(model(input_ids=ids).logits, ids)[0].tolist()
        for number, batch in enumerate(CurriculumLoader(plan, data, verify=False)):
            output = model(**batch)
            losses = _token_losses(output.logits, batch["labels"])
            expected = [[loss for row in rows for loss in alone[row]] for rows in plan.bins(number)]
            for place, wanted in enumerate(expected):
                found = losses[place][batch["labels"][place, 1:] != -100]
                torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
            assert float(output.loss) == pytest.approx(np.mean(flat(expected)), abs=1e-5)
            lengths = [sum(LENGTHS[row] for row in rows) for rows in plan.bins(number)]
            padded |= len(set(lengths)) > 1
    assert padded, "no batch had padding"


def test_with_a_cache_documents_would_see_each_other(make_tiny_model: Callable[..., Path]) -> None:
    # Why the batch says use_cache=False: transformers looks for packed documents only without a cache.
    model, data = _model(make_tiny_model("llama"), "sdpa"), documents()
    batch = PackedCollator()([pack(data[:4])])
    with torch.no_grad():
        kept_apart = model(**batch).logits
        mixed = model(**{**batch, "use_cache": True}).logits
    assert float((kept_apart - mixed).abs().max()) > 1e-3
