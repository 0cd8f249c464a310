"""A trainer compares its rows with the plan's before it removes their columns, and before it looks at the model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparsort
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin, CurriculumTrainer
from sparsort.errors import SparsortError
from sparsort.scoring.store.scores import Scores

OTHER_ROWS = "not the rows that the plan was made for, or they are in another order"
INCOMPARABLE = "cannot tell whether these are the rows"
WAYS_OUT = ("Keep ", "fingerprint=", "to plan_curriculum, which stores it, and to this call", "verify=False")
FORMS: dict[str, Any] = {"list": list, "dataset": datasets.Dataset.from_list}


def scored(rows: list[dict[str, Any]]) -> Scores:
    return sparsort.CompressionScorer().score(rows, prompt="{text}")


def only(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


def shuffled(rows: list[Any]) -> list[Any]:
    return random.Random(0).sample(rows, len(rows))


SMALL = [
    {"id": f"r{place}", "text": "w " * (1 + place * 7 % 13), "input_ids": [3] * (1 + place * 7 % 13)}
    for place in range(48)
]
SMALL = [{**row, "labels": row["input_ids"]} for row in SMALL]


def trainer(folder: Path, data: Any, *, keep: bool = False, plan: Any = None, **options: Any) -> CurriculumTrainer:
    """As a user writes it: only the model's columns are kept, unless `keep`."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=not keep,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
        python, numpy = random.getstate(), np.random.get_state()
        made = CurriculumTrainer(
            model,
            arguments,
            train_dataset=data,
            data_collator=one_length,
            curriculum=plan_curriculum(scored(SMALL), data=SMALL, batch_size=8) if plan is None else plan,
            **options,
        )
        random.setstate(python)
        np.random.set_state(numpy)
    return made


def one_length(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.tensor([[*example["input_ids"], *[0] * (longest - len(example["input_ids"]))] for example in examples])
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("form", ["list", "dataset"])
def test_a_trainer_compares_the_rows_before_their_columns_are_removed(tmp_path: Path, keep: bool, form: str) -> None:
    for rows in (SMALL, only(SMALL, "id", "input_ids", "labels"), only(SMALL, "text", "input_ids", "labels")):
        with pytest.raises(SparsortError, match=OTHER_ROWS):
            trainer(tmp_path, FORMS[form](shuffled(rows)), keep=keep)
        made = trainer(tmp_path, FORMS[form](rows), keep=keep)
        assert len(made.get_train_dataloader()) == 6
    bare = only(SMALL, "input_ids", "labels")
    with pytest.raises(SparsortError, match=INCOMPARABLE) as refused:
        trainer(tmp_path, FORMS[form](bare), keep=keep)
    assert all(way in str(refused.value) for way in WAYS_OUT)
    assert len(trainer(tmp_path, FORMS[form](bare), keep=keep, verify=False).get_train_dataloader()) == 6
    named = plan_curriculum(scored(SMALL), batch_size=8, fingerprint="small")
    made = trainer(tmp_path, FORMS[form](bare), keep=keep, plan=named, fingerprint="small")
    assert made.get_train_dataloader().state_dict()["data"] == "small"
    with pytest.raises(SparsortError, match="fingerprint='large'"):
        trainer(tmp_path, FORMS[form](bare), keep=keep, plan=named, fingerprint="large")


def test_a_dataset_given_after_construction_is_compared_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, None)
    made.train_dataset = datasets.Dataset.from_list(shuffled(SMALL))
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        made.get_train_dataloader()
    made.train_dataset = datasets.Dataset.from_list(only(SMALL, "input_ids", "labels"))
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        made.get_train_dataloader()
    made.train_dataset = datasets.Dataset.from_list(SMALL)
    assert len(made.get_train_dataloader()) == 6


class Hidden(Trainer):
    """Does not say which of its arguments is the dataset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def test_the_dataset_is_found_wherever_it_is_passed(tmp_path: Path) -> None:
    class Mixed(CurriculumMixin, Hidden):
        pass

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=8)
    plan = plan_curriculum(scored(SMALL), data=SMALL, batch_size=8)
    for cls in (CurriculumTrainer, Mixed):
        with pytest.raises(SparsortError, match=OTHER_ROWS):
            cls(None, arguments, train_dataset=SMALL[::-1], curriculum=plan)
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        CurriculumTrainer(None, arguments, one_length, SMALL[::-1], curriculum=plan)
    random_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        made = Mixed(torch.nn.Linear(1, 1), arguments, one_length, SMALL[::-1], curriculum=plan)
    random.setstate(random_state[0])
    np.random.set_state(random_state[1])
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        made.get_train_dataloader()


def test_the_input_of_the_fault_report_is_refused(tmp_path: Path) -> None:
    """`map` kept the texts and ids, `shuffle` moved them, and Trainer removed them before anybody looked."""
    rows = [{"id": f"r{place}", "text": "w " * (1 + place * 7 % 13)} for place in range(48)]
    plan = plan_curriculum(scored(rows), data=rows, batch_size=8)
    tokens = datasets.Dataset.from_list([{**row, "input_ids": [1], "labels": [1]} for row in rows]).shuffle(seed=42)
    for keep in (False, True):
        with pytest.raises(SparsortError, match=OTHER_ROWS):
            trainer(tmp_path, tokens, keep=keep, plan=plan)
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        CurriculumLoader(plan, tokens, collate_fn=list)
