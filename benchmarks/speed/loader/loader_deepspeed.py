"""DeepSpeed's curriculum sampler, for `loader_peers.py`: its configuration, its index files and its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_sessions import EPOCHS, PACED_SHARE_OF_EPOCH, SEED, Batch, Setup, State, as_list


class DeepSpeedSession:
    """DeepSpeed's DeepSpeedDataLoader with its DeepSpeedDataSampler, configured as `deepspeed.initialize` does.

    There is one integer metric, clustered by percentile in steps of ten, with linear pacing (`fixed_linear`). The data-parallel
    size is part of the size of the global batch. The process group has this process only, so that rank 0, which draws for all
    ranks, also yields the batches of all ranks.
    """

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.data_pipeline import constants as names
        from deepspeed.runtime.data_pipeline.config import get_data_efficiency_config
        from deepspeed.runtime.dataloader import DeepSpeedDataLoader

        self.per_epoch = setup.steps_of_epoch
        self.done = 0
        config = get_data_efficiency_config(
            {
                "data_efficiency": {
                    "enabled": True,
                    "seed": SEED,
                    "data_sampling": {
                        "enabled": True,
                        "num_epochs": EPOCHS,
                        "num_workers": setup.workers,
                        "curriculum_learning": {
                            "enabled": True,
                            "data_cluster_path": str(setup.folder / "clusters"),
                            "curriculum_metrics": {"difficulty": _deepspeed_metric(setup)},
                        },
                    },
                }
            }
        )
        self.loader = DeepSpeedDataLoader(
            setup.examples(),
            batch_size=setup.batch,
            pin_memory=False,
            local_rank=0,
            tput_timer=None,
            collate_fn=as_list,
            data_parallel_world_size=setup.ranks,
            data_parallel_rank=0,
            dataloader_drop_last=False,
            deepspeed_dataloader_config={
                names.CURRICULUM_LEARNING: True,
                names.DATA_EFFICIENCY: config,
                "data_parallel_group": _deepspeed_group(setup.folder),
                "gradient_accumulation_steps": 1,
                "global_rank": 0,
                names.DATA_SAMPLING_NUM_WORKERS: setup.workers,
            },
        )
        if states is not None:
            kept = states[0].content
            self.done = kept["global_steps"]
            self.loader.data_sampler.load_state_dict(kept["data_sampler"])

    def steps(self) -> Iterator[tuple[int, Batch]]:
        for batch in self.loader:
            self.done += 1
            # The sampler does not report epochs, so the epoch follows from the number of steps.
            yield (self.done - 1) // self.per_epoch, batch

    def states(self) -> list[State]:
        """The sampler's part of the engine's checkpoint."""
        state = {"data_sampler": self.loader.data_sampler.state_dict(), "global_steps": self.done}
        return [State.by_torch(state)]


def _deepspeed_group(folder: Path) -> Any:
    """Create the process group of this single process, once."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            init_method=f"file://{folder / 'rendezvous'}",
            rank=0,
            world_size=1,
        )
    return torch.distributed.group.WORLD


def _deepspeed_metric(setup: Setup) -> dict[str, Any]:
    """The metric's part of the configuration. Writes the two files of DeepSpeed's DataAnalyzer with DeepSpeed's builders."""
    from deepspeed.runtime.data_pipeline.data_sampling.utils import (
        close_mmap_dataset_builder,
        create_mmap_dataset_builder,
        find_fit_int_dtype,
    )

    order = np.argsort(setup.difficulty, kind="stable")
    # DeepSpeed's tutorial advises "a few thousands of distinct values" at most.
    values = min(setup.n, 1000)
    levels = np.empty(setup.n, dtype=np.int64)
    # Ranks of the difficulties, divided into `values` levels of nearly equal size.
    levels[order] = np.arange(setup.n) * values // setup.n
    paths = {name: str(setup.folder / f"difficulty_{name}") for name in ("index_to_sample", "index_to_metric")}
    # A rebuilt session uses the files of the first one, as in a real resume.
    if not Path(f"{paths['index_to_sample']}.idx").exists():
        samples = create_mmap_dataset_builder(paths["index_to_sample"], find_fit_int_dtype(0, setup.n - 1))
        metric = create_mmap_dataset_builder(paths["index_to_metric"], find_fit_int_dtype(0, values))
        for level in range(values):
            samples.add_item(torch.from_numpy(np.flatnonzero(levels == level)))
            metric.add_item(torch.tensor([level]))
        close_mmap_dataset_builder(samples, paths["index_to_sample"])
        close_mmap_dataset_builder(metric, paths["index_to_metric"])
    return {
        "index_to_sample_path": paths["index_to_sample"],
        "index_to_metric_path": paths["index_to_metric"],
        # Percentiles from the first share of the pacing to 100, in steps of ten.
        "difficulty_type": "percentile",
        "clustering_type": "schedule_based",
        "min_difficulty": round(100 * setup.first_share),
        "max_difficulty": 100,
        "schedule_type": "fixed_linear",
        "schedule_config": {
            "total_curriculum_step": max(1, round(PACED_SHARE_OF_EPOCH * setup.steps_of_epoch)),
            "difficulty_step": 10,
        },
    }
