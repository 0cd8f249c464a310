"""Trainers that choose their own batches are refused by name, and the others train in the plan's order: TRL's real classes.

The oracle of what a class defines is TRL's own source, parsed; nothing of it is imported for that.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import sparsort
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.classes import refuse_own_batches
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin, CurriculumTrainer
from sparsort.errors import SparsortError

REFUSED = "chooses its own training batches"
DEFINING = {"_get_train_sampler", "get_train_dataloader"}
N = 12
WORDS = ["[UNK]", "[PAD]", "[EOS]", "w", *(f"n{place}" for place in range(N))]


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _classes_in_trl() -> dict[str, tuple[str, set[str]]]:
    """Name of each trainer class in TRL's source → its module, and which of the two methods it defines."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    found = {}
    for path in sorted([*root.glob("trainer/*_trainer.py"), *root.glob("experimental/*/*_trainer.py")]):
        module = ".".join(["trl", *path.relative_to(root).with_suffix("").parts])
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and not node.name.startswith("_"):
                own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)} & DEFINING
                found[f"{module}.{node.name}"] = (module, own)
    return found


def _imported(module: str, name: str) -> type:
    with warnings.catch_warnings():
        # TRL warns of everything experimental, and its optional dependencies of themselves.
        warnings.simplefilter("ignore")
        found: type = getattr(importlib.import_module(module), name)
    return found


def _mixed(cls: type) -> type:
    return type(f"Mixed{cls.__name__}", (CurriculumMixin, cls), {})


def _problem(cls: type) -> str | None:
    try:
        refuse_own_batches(_mixed(cls), CurriculumMixin)
    except SparsortError as error:
        return str(error)
    return None


def test_every_class_of_trl_that_defines_its_own_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    refused, taken = [], []
    for path, (module, own) in _classes_in_trl().items():
        name = path.rpartition(".")[2]
        try:
            cls = _imported(module, name)
        except (ImportError, RuntimeError):  # an extra of TRL that is not installed, such as vLLM
            continue
        problem = _problem(cls)
        if problem is None:
            assert not own or name in ("GRPOTrainer", "RLOOTrainer"), f"{name} defines {own} and was taken"
            taken.append(name)
        else:
            assert REFUSED in problem
            assert problem.split()[0] in {base.__name__ for base in cls.__mro__}
            refused.append(name)
    assert {"DistillationTrainer", "KTOTrainer", "SDPOTrainer"} <= set(refused)
    assert {"SFTTrainer", "DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer"} <= set(taken)
    # Their layout is known; GMPOTrainer is a GRPOTrainer with another loss.
    assert {"GRPOTrainer", "RLOOTrainer", "GMPOTrainer"} <= set(taken)


def test_a_trainer_with_its_own_batches_is_refused_before_its_model_is_looked_for(tmp_path: Path) -> None:
    config = _imported("trl.trainer.distillation_config", "DistillationConfig")
    rows = [{"prompt": f"n{place}"} for place in range(N)]
    plan = plan_curriculum(np.arange(N), data=rows, batch_size=4)
    arguments = _arguments(config, tmp_path, bf16=False, activation_checkpointing=False)
    distillation = _imported("trl.trainer.distillation_trainer", "DistillationTrainer")
    with pytest.raises(SparsortError) as refused:
        _mixed(distillation)(
            "no/such-model", args=arguments, train_dataset=datasets.Dataset.from_list(rows), curriculum=plan
        )
    assert "DistillationTrainer chooses its own training batches (it defines _get_train_sampler)" in str(refused.value)
    assert "train_dataset.select(plan.order) and shuffle_dataset=False" in str(refused.value)


def test_each_way_of_choosing_batches_is_refused() -> None:
    class Sampled(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any: ...

    class Loaded(Trainer):
        def get_train_dataloader(self) -> Any: ...

    class Generated(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return self.model.generate(inputs)

    class LoadedMixin:
        def get_train_dataloader(self) -> Any: ...

    class Below(Sampled):
        pass

    class SampledOnTop(CurriculumTrainer):
        def _get_train_sampler(self, *_: Any) -> Any: ...

    bases = {"Sampled": Sampled, "Loaded": Loaded, "Generated": Generated}
    for name, base in bases.items():
        with pytest.raises(SparsortError, match=f"^{name} {REFUSED}"):
            refuse_own_batches(_mixed(base), CurriculumMixin)
    with pytest.raises(SparsortError, match=f"^Sampled {REFUSED}"):
        refuse_own_batches(_mixed(Below), CurriculumMixin)
    with pytest.raises(SparsortError, match=f"^LoadedMixin {REFUSED}"):
        refuse_own_batches(type("Both", (CurriculumMixin, LoadedMixin, Trainer), {}), CurriculumMixin)
    with pytest.raises(SparsortError, match=f"^SampledOnTop {REFUSED}"):
        refuse_own_batches(SampledOnTop, CurriculumMixin)


def test_arguments_that_batch_for_generation_or_reorder_rows_are_refused() -> None:
    class Moving(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    class Args:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    mixed = _mixed(Moving)
    refuse_own_batches(mixed, CurriculumMixin, Args(packing=False, shuffle_dataset=False, num_generations=None))
    for name in ("num_generations", "generation_batch_size", "steps_per_generation"):
        with pytest.raises(SparsortError, match=rf"^Moving {REFUSED} \(Args sets {name}\)"):
            refuse_own_batches(mixed, CurriculumMixin, Args(**{name: 4}))
    packs = (
        r"packing=True makes Moving .*plan_curriculum\(…, packing='next_fit'.*trl\.pack_dataset.*skip_prepare_dataset"
    )
    with pytest.raises(SparsortError, match=packs):
        refuse_own_batches(mixed, CurriculumMixin, Args(packing=True))
    packed_before = Args(packing=True, shuffle_dataset=True, dataset_kwargs={"skip_prepare_dataset": True})
    refuse_own_batches(mixed, CurriculumMixin, packed_before)
    with pytest.raises(SparsortError, match=packs):
        refuse_own_batches(mixed, CurriculumMixin, packed_before, plan_packs=True)
    with pytest.raises(SparsortError, match=r"shuffle_dataset=True makes Moving .* omit it: the plan orders"):
        refuse_own_batches(mixed, CurriculumMixin, Args(shuffle_dataset=True))


def test_a_subclass_may_add_to_the_loader_but_not_replace_it(tmp_path: Path) -> None:
    class Adding(CurriculumTrainer):
        def get_train_dataloader(self) -> Any:
            self.made = super().get_train_dataloader()
            return self.made

    class Replacing(CurriculumTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4)

    rows = [{"input_ids": [3, place % 8], "labels": [3, place % 8]} for place in range(N)]
    plan = plan_curriculum(np.arange(N), data=rows, batch_size=4)
    for cls in (Adding, Replacing):
        made = cls(
            _model(),
            _arguments(TrainingArguments, tmp_path),
            curriculum=plan,
            train_dataset=rows,
            data_collator=_stacked,
        )
        if cls is Adding:
            assert made.train().global_step == 3
        else:
            with pytest.raises(SparsortError, match="would follow a DataLoader instead of the plan"):
                made.train()


def _stacked(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in ("input_ids", "labels")}


def _model() -> LlamaForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=1, eos_token_id=2, **size))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def _arguments(config: Any, folder: Path, **options: Any) -> Any:
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return config(str(folder), per_device_train_batch_size=4, num_train_epochs=1, **quiet, **options)


def _plan(rows: list[dict[str, Any]], column: str) -> CurriculumPlan:
    scores = sparsort.CompressionScorer().score(rows, prompt=f"{{{column}}}")
    return plan_curriculum(scores, data=rows, batch_size=4, direction="random", seed=1)


class Recorded:
    """Writes down the row of each example, whose number is one of its words."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"].tolist()
        rows = [next(word - 4 for word in example if word >= 4) for example in ids]
        self.__dict__.setdefault("seen", []).append(rows)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


def test_sft_trains_in_the_plans_order_and_refuses_other_rows(tmp_path: Path) -> None:
    sft, config = _imported("trl.trainer.sft_trainer", "SFTTrainer"), _imported("trl.trainer.sft_config", "SFTConfig")
    cls: Any = type("Sft", (Recorded, CurriculumMixin, sft), {})
    rows = [{"text": f"n{place} " + "w " * (place % 3)} for place in range(N)]
    plan = _plan(rows, "text")
    given = {"curriculum": plan, "processing_class": _tokenizer()}
    options = {"bf16": False, "activation_checkpointing": False}
    data = datasets.Dataset.from_list(rows)
    trainer = cls(_model(), _arguments(config, tmp_path, **options), train_dataset=data, **given)
    trainer.train()
    assert trainer.seen == [plan.batch(number).tolist() for number in range(3)]
    with pytest.raises(SparsortError, match="not the rows that the plan was made for"):
        cls("no/such-model", _arguments(config, tmp_path, **options), train_dataset=data.shuffle(seed=0), **given)
    for name in ("packing", "shuffle_dataset"):
        arguments = _arguments(config, tmp_path, **options, **{name: True})
        with pytest.raises(SparsortError, match=f"{name}=True makes SFTTrainer"):
            cls("no/such-model", arguments, train_dataset=data, **given)


class Packed:
    """Writes down the documents of every micro-batch: each begins at position 0 (or at the first column, without positions)."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch: list[list[list[int]]] = []
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            positions = inputs["position_ids"][row].tolist() if "position_ids" in inputs else range(len(ids))
            documents: list[list[int]] = []
            for token, position in zip(ids, positions, strict=True):
                documents += [[]] if position == 0 else []
                documents[-1].append(token)
            batch.append([document for document in documents if document != [1]])
        self.__dict__.setdefault("packed", []).append(batch)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


# Row i consists of one to four times the token 4 + i.
_DOCUMENTS = [[4 + place] * (1 + place % 4) for place in range(N)]


def _packed(folder: Path, data: Any, plan: CurriculumPlan, **options: Any) -> list[list[list[list[int]]]]:
    """What SFTTrainer trains on: for each step, the documents of each sequence."""
    sft, config = _imported("trl.trainer.sft_trainer", "SFTTrainer"), _imported("trl.trainer.sft_config", "SFTConfig")
    arguments = _arguments(config, folder, bf16=False, activation_checkpointing=False, **options)
    arguments.per_device_train_batch_size = plan.settings.batch_size
    trainer: Any = type("Sft", (Packed, CurriculumMixin, sft), {})(
        _model(), arguments, curriculum=plan, train_dataset=data, processing_class=_tokenizer()
    )
    trainer.train()
    packed: list[list[list[list[int]]]] = trainer.packed
    return packed


def test_sft_trains_on_sequences_that_the_plan_packs(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"input_ids": _DOCUMENTS})
    lengths = [len(document) for document in _DOCUMENTS]
    plan = plan_curriculum(
        np.arange(N)[::-1], data=data, batch_size=2, packing="next_fit", pack_length=5, lengths=lengths
    )
    assert _packed(tmp_path, data, plan) == [
        [[_DOCUMENTS[row] for row in rows] for rows in plan.bins(number)] for number in range(plan.n_batches)
    ]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_sft_trains_in_the_order_of_sequences_that_trl_packed_before(tmp_path: Path, strategy: Any) -> None:
    pack_dataset = _imported("trl", "pack_dataset")
    rows = datasets.Dataset.from_dict({"input_ids": _DOCUMENTS})
    packed = pack_dataset(rows, 4, strategy)
    plan = plan_curriculum(np.arange(len(packed))[::-1], data=packed, batch_size=2)
    skip = {"skip_prepare_dataset": True}
    found = _packed(tmp_path, packed, plan, packing=True, packing_strategy=strategy, max_length=4, dataset_kwargs=skip)
    # With bfd, TRL joins all sequences of a batch into one row, and keeps their documents apart by positions.
    tokens = [[token for row in step for document in row for token in document if token != 1] for step in found]
    assert tokens == [
        [token for row in plan.batch(number).tolist() for token in packed[row]["input_ids"]]
        for number in range(plan.n_batches)
    ]
    if strategy == "bfd":
        assert all(len(set(document)) == 1 for step in found for row in step for document in row)


# TRL looks at an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_dpo_trains_in_the_plans_order(tmp_path: Path) -> None:
    dpo, config = _imported("trl.trainer.dpo_trainer", "DPOTrainer"), _imported("trl.trainer.dpo_config", "DPOConfig")

    class Dpo(Recorded, CurriculumMixin, dpo):  # type: ignore[valid-type, misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            half = len(inputs["input_ids"]) // 2  # the chosen answers, then the rejected ones
            self.__dict__.setdefault("pairs", []).append(half)
            return super().training_step(model, inputs, *args, **kwargs)

    rows = [{"prompt": f"n{place}", "chosen": " w w", "rejected": " w"} for place in range(N)]
    plan = _plan(rows, "prompt")
    trainer = Dpo(
        _model(),
        _model(),
        args=_arguments(config, tmp_path, bf16=False, activation_checkpointing=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        curriculum=plan,
    )
    trainer.train()
    assert [seen[:half] for seen, half in zip(trainer.seen, trainer.pairs, strict=True)] == [
        plan.batch(number).tolist() for number in range(3)
    ]


# TRL looks at an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sft_and_dpo_resume_exactly_from_every_checkpoint(tmp_path: Path, kind: str) -> None:
    name = kind.upper()
    trainer_class = _imported(f"trl.trainer.{kind}_trainer", f"{name}Trainer")
    config = _imported(f"trl.trainer.{kind}_config", f"{name}Config")
    pairs = {"prompt": [f"n{place}" for place in range(N)], "chosen": [" w w"] * N, "rejected": [" w"] * N}
    data = datasets.Dataset.from_dict(pairs if kind == "dpo" else {"text": [f"n{place} w" for place in range(N)]})
    plan = plan_curriculum(np.arange(N)[::-1], data=data, batch_size=4, stages=2)

    class Losses(Recorded, CurriculumMixin, trainer_class):  # type: ignore[valid-type, misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.__dict__.setdefault("losses", []).append(float(loss).hex())
            return loss

    def run(folder: Path, checkpoint: int | None = None) -> Any:
        options: dict[str, Any] = {"bf16": False, "activation_checkpointing": False, "save_steps": 1}
        arguments = _arguments(config, folder, **options)
        arguments.num_train_epochs, arguments.save_strategy = 2, "no" if checkpoint else "steps"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, reference = _model(), _model()
        given: dict[str, Any] = {"ref_model": reference} if kind == "dpo" else {}
        given |= {"args": arguments, "train_dataset": data, "processing_class": _tokenizer(), "curriculum": plan}
        trainer = Losses(model, **given)
        trainer.train(str(tmp_path / "whole" / f"checkpoint-{checkpoint}") if checkpoint else None)
        return trainer

    whole = run(tmp_path / "whole")
    assert len(whole.losses) == 6
    for step in range(1, 6):
        again = run(tmp_path / "again", step)
        assert again.losses == whole.losses[step:]
        assert again.seen == whole.seen[step:]
