"""Whether the reading code of other trainers keeps the order of `sparsort plan --export`.

    python benchmarks/checks/trainer_exports.py [--json]

For each client that can be imported, a plan over 60 rows is exported in the client's format. The client's own code then reads
the file, and its own sampler draws one epoch with the settings of docs/exports.md, and again with its default settings. The line
says whether the order was that of the plan. No model is trained. No client is a requirement of sparsort: install those that you
want to check into an environment of your own. One that cannot be imported is reported with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np

from sparsort import plan_curriculum
from sparsort.curriculum.loading.export import export_plan

N = 60
ROWS = [{"number": n, "instruction": f"question {n}", "output": f"answer {n}", "text": f"row {n}"} for n in range(N)]
Order = list[int]


def verl(folder: Path) -> tuple[Order, Order]:
    """The dataset and the sampler of verl's reinforcement learning."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.utils.dataset.rl_dataset import RLHFDataset

    orders = []
    for shuffle in (False, True):
        config = OmegaConf.create(
            {"shuffle": shuffle, "seed": 1, "filter_overlong_prompts": False, "cache_dir": str(folder / "cache")}
        )
        data = RLHFDataset(data_files=str(folder / "rows.parquet"), tokenizer=None, config=config)
        orders.append([data.dataframe[place]["number"] for place in create_rl_sampler(config, data)])
    return orders[0], orders[1]


def axolotl(folder: Path) -> tuple[Order, Order]:
    """The loading and merging of datasets, and the sampler of the trainer."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.utils.data.shared import load_dataset_with_config, merge_datasets
    from axolotl.utils.dict import DictDefault

    orders = []
    for ordered in (True, False):
        config = DictDefault(
            {
                "curriculum_sampling": ordered or None,
                "shuffle_merged_datasets": not ordered,
                "seed": 1,
                "ds_type": "parquet",
            }
        )
        entry = DictDefault({"path": str(folder / "rows.parquet"), "ds_type": "parquet"})
        data = merge_datasets([load_dataset_with_config(entry, use_auth_token=False)], config)
        order = list(data["number"])
        if ordered:
            arguments = SimpleNamespace(curriculum_sampling=True, sample_packing=False, pretraining=False)
            trainer = SimpleNamespace(args=arguments, train_dataset=data)
            order = [order[place] for place in AxolotlTrainer._get_train_sampler(trainer, data)]
        orders.append(order)
    return orders[0], orders[1]


def llama_factory(folder: Path) -> tuple[Order, Order | None]:
    """The loading of a local file; its trainer draws in order with `disable_shuffling`, which is not run here."""
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list

    columns = {"prompt": "instruction", "response": "output"}
    information = {"rows": {"file_name": "rows.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(information))
    (attributes,) = get_dataset_list(["rows"], str(folder))
    data_arguments = SimpleNamespace(
        dataset_dir=str(folder),
        streaming=False,
        preprocessing_num_workers=None,
        max_samples=None,
        overwrite_cache=True,
        media_dir="",
    )
    model_arguments = SimpleNamespace(cache_dir=str(folder / "cache"), hf_hub_token=None)
    training_arguments = SimpleNamespace(local_process_index=0, dataloader_num_workers=0)
    data = _load_single_dataset(attributes, model_arguments, data_arguments, training_arguments)
    return [int(row["_prompt"][0]["content"].split()[-1]) for row in data], None


def olmo_core(folder: Path) -> tuple[Order, Order]:
    """A dataset of token ids, one document for each row of the export, and the data loader."""
    from olmo_core.data import DataCollator, NumpyFSLDataLoader, NumpyFSLDataset

    exported = datasets.load_dataset(
        "parquet", data_files=str(folder / "rows.parquet"), cache_dir=str(folder / "cache")
    )
    # Here each row is a sequence of 8 tokens that are its number; a user writes the tokens of each row, one after the other.
    np.repeat(np.array(exported["train"]["number"], dtype=np.uint16), 8).tofile(folder / "tokens.npy")
    orders = []
    for shuffle in (False, True):
        data = NumpyFSLDataset(
            folder / "tokens.npy", sequence_length=8, pad_token_id=0, eos_token_id=N, vocab_size=N + 1
        )
        data.work_dir = folder / f"work-{shuffle}"
        data.prepare()
        loader = NumpyFSLDataLoader(
            data,
            collator=DataCollator(pad_token_id=0),
            global_batch_size=8 * 4,
            work_dir=folder / f"work-{shuffle}",
            shuffle=shuffle,
        )
        loader.reshuffle(epoch=1)
        orders.append([int(row[0]) for batch in loader for row in batch["input_ids"]])
    return orders[0], orders[1]


def torchtune(folder: Path) -> tuple[Order, Order]:
    """The text dataset, and the sampler of its recipes."""
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
    from torchtune.datasets import text_completion_dataset

    class Letters:
        """A tokenizer whose tokens are the characters."""

        def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
            return list(map(ord, text))

        max_seq_len = None
        eos_id = 0

    data = text_completion_dataset(
        Letters(), source="json", data_files=str(folder / "rows.jsonl"), add_eos=False, cache_dir=str(folder / "cache")
    )
    orders = []
    for shuffle in (False, True):
        sampler = StatefulDistributedSampler(data, num_replicas=1, rank=0, shuffle=shuffle, seed=0)
        orders.append([int("".join(map(chr, data[place]["tokens"])).split()[-1]) for place in sampler])
    return orders[0], orders[1]


def nemo_rl(folder: Path) -> tuple[Order, Order | None]:
    """The dataset of prompts and responses, from a local file."""
    from nemo_rl.data.datasets.response_datasets.response_dataset import ResponseDataset

    data = ResponseDataset(str(folder / "rows.jsonl"), input_key="instruction", output_key="output")
    return [int(row["messages"][0]["content"].split()[-1]) for row in data.dataset], None


CLIENTS: dict[str, tuple[str, Callable[[Path], tuple[Order, Order | None]]]] = {
    "verl": ("verl", verl),
    "axolotl": ("axolotl", axolotl),
    "LLaMA-Factory": ("llamafactory", llama_factory),
    "OLMo-core": ("ai2-olmo-core", olmo_core),
    "torchtune": ("torchtune", torchtune),
    "NeMo-RL": ("nemo-rl", nemo_rl),
}


def check(client: str) -> dict[str, str]:
    """What the client did with an export."""
    package, read = CLIENTS[client]
    plan = plan_curriculum(np.random.default_rng(0).permutation(N).astype(float), batch_size=4, stages=3)
    expected = [int(row) for number in range(plan.n_batches) for row in plan.batch(number)]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return {"client": client, "version": "", "result": "not tried: not installed"}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("rows.parquet", "rows.jsonl"):
            export_plan(plan, ROWS, folder / name)
        try:
            ordered, default = read(folder)
        except Exception as error:  # noqa: BLE001  a client may fail in any way, and the reason is the result
            return {
                "client": client,
                "version": version,
                "result": f"not tried: {type(error).__name__}: {' '.join(str(error).split()):.90}",
            }
    kept = "the order of the plan" if ordered == expected else f"ANOTHER ORDER: {ordered[:8]} …, not {expected[:8]} …"
    if default is not None:
        kept += "; by default " + ("the same" if default == expected else "another order")
    return {"client": client, "version": version, "result": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each client")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    for client in CLIENTS:
        found = check(client)
        print(json.dumps(found) if arguments.json else "{client} {version}: {result}".format(**found), flush=True)


if __name__ == "__main__":
    main()
