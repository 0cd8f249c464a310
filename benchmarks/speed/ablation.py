"""How fast an ablation of orders is compared with reading every whole prompt, and how long the published study takes.

    python benchmarks/speed/ablation.py [--quick] [--json] [--save] [--data FOLDER] [--compile] [--model demo] [--recipe FILE]

An item is one query under one order of the demonstrations: the log-probabilities of all labels. Our side is the ablation as a
user runs it: 24 orders of one set of 8 demonstrations × 256 queries, with its splits and its store on disk, in rounds of equally
many orders. The baselines are too slow to run in full. In every round, each of them runs a seeded sample of the round's items, in
turn with our side, and times are compared per item. All sides use the same model object and threads. With `--compile` our side
reads answers with the compiled model, as `sparsort ablate --compile` does; the baselines are not compiled.

`label_by_label` is what OpenICL's perplexity inferencer does: for each label it reads all whole prompts in batches of 8 padded on
the right, computes the logits of every position and the cross-entropy of every token, and the smallest mean wins.
`prompt_by_prompt` is the best that a plain script does: it reads each prompt once, in batches of 8 padded on the left, and takes
all labels from the logits at the last position.

The study's time is a projection: the tokens that `cost.estimate` counts for the recipe, at the speeds measured here for each of
its tasks, in one process. FLOPs are 2 · (weights of the blocks' matrices) · tokens + 2 · (weights of the head) · items, without
attention.

`--data` points to a folder with `icl/trec.train.jsonl` and similar files. Without it the reviews of this repository are read, and
there is no floor. The cost of a calibration is printed by `benchmarks/speed/calibration.py`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Comparison, Report, add_output_options, wall_seconds
from numpy.typing import NDArray
from scoring import matrix_peak

from sparsort.curriculum.ablation.recipe.ablation import Ablation, DemoSet
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.run import cost
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.curriculum.ablation.run.run import AblationRunner
from sparsort.curriculum.ablation.store.order_notes import group_name
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError
from sparsort.kernels.backend import default_device
from sparsort.scoring.answers.generation import generate
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.loading.load import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "benchmarks" / "studies" / "ordering_study.toml"
K, ORDERS, QUERIES, BATCH = 8, 24, 256, 8
# Number of tokens generated to measure the time of one.
_WRITTEN = 8
REVIEWS = Task(
    name="reviews",
    prompt="Review: {text}\nLabel:",
    answer=" {label}",
    labels={"negative": "negative", "positive": "positive"},
    train="reviews.jsonl",
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes: rounds, our orders per round, the baselines' batches per round, and queries for the check and the study."""

    rounds: int
    orders: int
    label_batches: int
    prompt_batches: int
    exact_queries: int
    speed_sets: int
    speed_queries: int


FULL = Sizes(
    rounds=4, orders=6, label_batches=1, prompt_batches=4, exact_queries=8, speed_sets=2, speed_queries=QUERIES
)
QUICK = Sizes(rounds=2, orders=2, label_batches=1, prompt_batches=2, exact_queries=2, speed_sets=1, speed_queries=48)


class Grid:
    """The items of the benchmark: one demonstration set, its orders, and the queries, as texts.

    Args:
        recipe: one task, one set, K shots and ORDERS random orders.
        tokenizer: the model's.
    """

    def __init__(self, recipe: Ablation, tokenizer: Any) -> None:
        (task,) = recipe.load_tasks()
        self.recipe, self.task, self.texts = recipe, task, Texts(task, tokenizer)
        data = TaskData(task, recipe)
        self.unit = DemoSet(task=task.name, selector="random", k=K, seed=recipe.first_seed)
        self.queries = data.test_texts
        self.labels = task.label_texts()
        self.orders = recipe.orders(K, recipe.first_seed)
        showing = data.draw(self.unit)
        self.prefixes = [self.texts.prefix(showing.demos(0, order)) for order in self.orders]

    def sample(self, orders: range, batches: int, generator: np.random.Generator) -> list[tuple[int, range]]:
        """The batches of a baseline: (order, BATCH neighbouring queries)."""
        starts = generator.choice(len(self.queries) // BATCH, size=batches, replace=False) * BATCH
        return [(int(generator.choice(orders)), range(start, start + BATCH)) for start in starts.tolist()]

    def prompts(self, sample: Sequence[tuple[int, Sequence[int]]]) -> list[str]:
        """The whole prompts of a sample, up to the beginning of the answer."""
        return ["".join(self.prefixes[order]) + self.queries[query] for order, queries in sample for query in queries]


class Baselines:
    """The two ways to query one model without shared prefixes.

    Raises:
        SparsortError: a label has several tokens, so the logits of one position do not score it.
    """

    def __init__(self, loaded: LoadedModel, grid: Grid) -> None:
        self.model, self.labels = loaded.model, grid.labels
        # A copy, because the padding token set here must not change the tokenizer of our side.
        self.tokenizer = copy.deepcopy(loaded.tokenizer)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        prompt = grid.prompts([(0, range(1))])[0]
        before = self.tokenizer(prompt)["input_ids"]
        # The label is tokenized after a prompt, because a token may include the space before the label.
        label_ids = [self.tokenizer(prompt + label)["input_ids"][len(before) :] for label in self.labels]
        if any(len(ids) != 1 for ids in label_ids):
            raise SparsortError(
                f"{loaded.name!r} writes a label of {grid.task.name!r} in several tokens; take another model."
            )
        self.label_ids = [ids[0] for ids in label_ids]

    def label_by_label(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(Q, L) mean negative log-likelihood of every whole text, as OpenICL's perplexity inferencer computes it."""
        columns = [
            np.concatenate([self._perplexity(batch, label) for batch in _batches(prompts)]) for label in self.labels
        ]
        return np.stack(columns, axis=1)

    @torch.no_grad()
    def _perplexity(self, prompts: Sequence[str], label: str) -> NDArray[np.float64]:
        inputs = self._encode([prompt + label for prompt in prompts], "right")
        # Logits at position t predict token t + 1.
        logits = self.model(**inputs).logits[:, :-1].contiguous()
        targets = inputs["input_ids"][:, 1:].contiguous()
        pad = self.tokenizer.pad_token_id
        losses = torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="none", ignore_index=pad
        )
        # Like OpenICL, divide by all tokens of the text, of which the first has no loss.
        means = losses.view(targets.shape).sum(dim=-1) / (inputs["input_ids"] != pad).sum(dim=-1)
        return means.double().cpu().numpy()

    @torch.inference_mode()
    def prompt_by_prompt(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(Q, L) log-probabilities of the labels at the last position of every prompt."""
        found = []
        for batch in _batches(prompts):
            inputs = self._encode(batch, "left")
            # With padding on the left, the first real token has position 0.
            positions = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
            result = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
            found.append(result.logits[:, -1].float().log_softmax(dim=-1)[:, self.label_ids].double().cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def alone(self, prompt: str) -> NDArray[np.float64]:
        """(L,) log-probabilities of the labels, one prompt and label at a time: the plain computation."""
        values = []
        for label, token in zip(self.labels, self.label_ids, strict=True):
            logits = self.model(**self._encode([prompt + label], "right"), use_cache=False, logits_to_keep=2).logits
            values.append(float(logits[0, 0].double().log_softmax(dim=-1)[token]))
        return np.array(values)

    def _encode(self, texts: Sequence[str], side: str) -> dict[str, Any]:
        inputs = self.tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


@dataclass
class Timed:
    """One side: seconds per item in every round, its predictions by (order, query), and the items with tied labels."""

    seconds: list[float] = field(default_factory=list)
    predicted: dict[tuple[int, int], int] = field(default_factory=dict)
    ties: int = 0

    def run(self, function: Callable[[], NDArray[np.float64] | None], items: Sequence[tuple[int, int]]) -> None:
        """Time one round. The prediction of a row is its largest value, the first one if several are equal."""
        values: list[NDArray[np.float64] | None] = []
        self.seconds.append(wall_seconds(lambda: values.append(function())) / len(items))
        if (found := values[0]) is not None:
            self.predicted |= zip(items, found.argmax(axis=1).tolist(), strict=True)
            # In half precision two labels often have equal values, and then a prediction depends on their
            # order.
            self.ties += int(((found == found.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())


def measure_speed(report: Report, grid: Grid, engine: Engine, sizes: Sizes, floors: bool) -> None:
    """Measure items per second of all sides, the agreement of their predictions, and our share of the peak."""
    dtype = str(engine.loaded.dtype.value).removeprefix("torch.")
    peak = matrix_peak(engine.loaded.model.dtype, engine.loaded.device.value)
    report.add("matrix_product_peak", peak / 1e9, "GFLOP/s", note=dtype)
    baselines, generator = Baselines(engine.loaded, grid), np.random.default_rng(0)
    ours, by_label, by_prompt = Timed(), Timed(), Timed()
    tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        store = OutcomeStore(Path(folder) / "store", engine.identity, feature_names=engine.feature_names)
        _warm_up(grid, engine, store, baselines)
        for number in range(sizes.rounds):
            orders = range(number * sizes.orders, (number + 1) * sizes.orders)
            # A recipe with more orders asks for the new ones alone.
            run = AblationRunner(dataclasses.replace(grid.recipe, random_orders=orders.stop), engine, store)
            few, many = (grid.sample(orders, n, generator) for n in (sizes.label_batches, sizes.prompt_batches))
            sides: list[Callable[[], None]] = [
                lambda r=run, o=orders: ours.run(
                    lambda: _run(r, grid.unit),
                    [(order, query) for order in o for query in range(len(grid.queries))],
                ),
                lambda s=few: by_label.run(lambda: -baselines.label_by_label(grid.prompts(s)), _items(s)),
                lambda s=many: by_prompt.run(lambda: baselines.prompt_by_prompt(grid.prompts(s)), _items(s)),
            ]
            # The order of the sides rotates from round to round, so that none is always first.
            for turn in range(3):
                sides[(number + turn) % 3]()
            tokens += run.tokens_read
        ours.predicted = _stored(grid, store, range(sizes.rounds * sizes.orders))
    items = sizes.rounds * sizes.orders * len(grid.queries)
    seconds = sum(ours.seconds) / sizes.rounds * items
    report.add("items_per_second", items / seconds, "1/s", note=f"{items} items, including the work of the store")
    report.add("tokens_per_second", tokens / seconds, "1/s", note=f"{tokens} tokens run, {tokens / items:.1f} an item")
    for name, side, floor in (("label_by_label", by_label, 40.0), ("prompt_by_prompt", by_prompt, 6.0)):
        ratio = _compared(side.seconds, ours.seconds)
        same = [side.predicted[item] == ours.predicted[item] for item in side.predicted]
        note = f"{1 / ratio.ours_s:.0f} against {1 / ratio.baseline_s:.2f} items/s, {ratio.lowest_ratio:.1f} to "
        note += f"{ratio.highest_ratio:.1f} in {sizes.rounds} rounds; the baseline on a sample of {len(same)} items"
        report.add(f"speedup_over_{name}", ratio.ratio, "x", floor=floor if floors else None, note=note)
        note = f"of {len(same)} predictions, both in {dtype}; the baseline's best two labels tie in {side.ties}"
        report.add(f"agreement_with_{name}", sum(same) / len(same), "", note=note)
    backbone = engine.reader(grid.task).backbone
    matrices = sum(m.weight.numel() for m in backbone.blocks.modules() if isinstance(m, torch.nn.Linear))
    head = engine.loaded.model.get_output_embeddings().weight.numel()
    # Two operations, a product and a sum, for each weight and token. The head runs once per item.
    blocks_share = 2 * matrices * tokens / seconds / peak
    report.add(
        "share_of_peak",
        blocks_share + 2 * head * items / seconds / peak,
        "",
        note=f"{blocks_share:.2f} without the head",
    )


def measure_where(report: Report, grid: Grid, engine: Engine) -> None:
    """Measure the time of one order by operator."""
    reader = engine.reader(grid.task)
    chunks = grid.prefixes[0][::-1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = wall_seconds(lambda: reader.answers(chunks, grid.queries, grid.labels))
    # Self time, so that the time of a nested operator is counted once.
    spent: defaultdict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        product = any(name in event.key for name in ("mm", "mkldnn", "linear"))
        spent["matrix products" if product else event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e6
    inside = sum(spent.values())
    spent["outside torch"] = max(seconds - inside, 0.0)
    share = {name: value / sum(spent.values()) for name, value in spent.items()}
    rest = sorted((name for name in share if name != "matrix products"), key=lambda name: -share[name])[:6]
    note = "also " + ", ".join(f"{name} {share[name]:.0%}" for name in rest)
    report.add("time_in_matrix_products", share["matrix products"], "", note=f"{note}; under the profiler")


def measure_exactness(report: Report, grid: Grid, sizes: Sizes, name: str, compile: bool) -> None:
    """Compare log-probabilities in fp32 with those of one query, one label and the whole prompt at a time."""
    loaded = load_model(name, dtype="float32")
    baselines, reader = Baselines(loaded, grid), AnswerReader(loaded, compile=compile)
    places = np.random.default_rng(1).choice(len(grid.queries), size=sizes.exact_queries, replace=False).tolist()
    gaps, agree = [], 0
    for order, half in enumerate((places[::2], places[1::2])):
        # All queries at once, as in an ablation, because a pass with few tokens would not run through compiled blocks.
        ours = reader.answers(grid.prefixes[order], grid.queries, grid.labels).log_p[half]
        plain = np.stack([baselines.alone(prompt) for prompt in grid.prompts([(order, [query]) for query in half])])
        gaps.append(np.abs(ours - plain).max())
        agree += int((ours.argmax(axis=1) == plain.argmax(axis=1)).sum())
    note = f"largest; {agree} of {len(places)} predictions agree"
    note += f"; {reader.reader.n_fused_tokens} tokens through compiled blocks, padding among them" if compile else ""
    report.add("log_p_gap_in_fp32", max(gaps), "nats", floor=1e-3, better="lower", note=note)


def project_study(report: Report, recipe: Ablation, engine: Engine, sizes: Sizes, floors: bool) -> None:
    """Project the study's time from the tokens that its plan counts and the speeds of this machine."""
    count = lambda text: len(engine.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    lengths, speeds = [], {}
    for task in recipe.load_tasks():
        data = TaskData(task, recipe)
        lengths.append(cost.measure(task, data.splits, count))
        speeds[task.name] = _speeds(recipe, data, lengths[-1], engine, sizes)
    plan = cost.estimate(recipe, lengths)
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in plan.rows:
        prefix, query, written = speeds[row.task]
        # The rest are queries and labels after shared prefixes.
        others = row.tokens - row.prefix_tokens - row.generated_tokens
        seconds[row.task] += row.prefix_tokens / prefix + row.generated_tokens / written + others / query
    hours = ", ".join(f"{task} {value / 3600:.2f}" for task, value in seconds.items())
    report.add(
        "study_hours_projected",
        sum(seconds.values()) / 3600,
        "h",
        floor=3.0 if floors else None,
        better="lower",
        note=f"a projection, not a run: {plan.tokens / 1e6:.1f} million tokens ({plan.plain_tokens / plan.tokens:.0f} times as "
        f"many without sharing), {plan.pairs} items of {plan.sets} sets, one process; {hours}",
    )


def _speeds(
    recipe: Ablation, data: TaskData, lengths: cost.Lengths, engine: Engine, sizes: Sizes
) -> tuple[float, float, float]:
    """Tokens per second of a task, as the plan counts them: prefixes with one query each, queries after one, and generated
    tokens."""
    task, k, reader = data.task, max(recipe.shots), engine.reader(data.task)
    texts, queries = Texts(task, engine.loaded.tokenizer), data.test_texts[: sizes.speed_queries]
    ask = functools.partial(reader.answers, answers=task.label_texts())
    one, many, write = [], [], []
    # What a compiler does for new shapes is no part of a token's time.
    other = data.draw(DemoSet(task=task.name, selector="random", k=k, seed=recipe.first_seed + sizes.speed_sets))
    ask(texts.prefix(other.demos(0, range(k))), queries)
    for seed in range(sizes.speed_sets):
        showing = data.draw(DemoSet(task=task.name, selector="random", k=k, seed=recipe.first_seed + seed))
        chunks = texts.prefix(showing.demos(0, range(k)))
        # An unrelated prefix, so that the reader has no cached keys of the timed prefix.
        ask([], queries[:1])
        one.append(wall_seconds(functools.partial(ask, chunks, queries[:1])))
        many.append(wall_seconds(functools.partial(ask, chunks, queries)))
        write.append(wall_seconds(functools.partial(generate, reader, chunks, queries[:1], max_new_tokens=_WRITTEN)))
    asked = len(queries) * (lengths.query + sum(lengths.labels))
    prefix = lengths.head + k * lengths.demo
    return prefix / statistics.median(one), asked / statistics.median(many), _WRITTEN / statistics.median(write)


def _warm_up(grid: Grid, engine: Engine, store: OutcomeStore, baselines: Baselines) -> None:
    """Run every side once, ours with other demonstrations than the timed ones."""
    other = grid.recipe.first_seed + 1
    small = dataclasses.replace(grid.recipe, first_seed=other, random_orders=2, test_rows=BATCH)
    AblationRunner(small, engine, store).run_set(dataclasses.replace(grid.unit, seed=other))
    prompts = grid.prompts([(0, range(BATCH))])
    baselines.prompt_by_prompt(prompts)
    baselines.label_by_label(prompts[:1])


def _stored(grid: Grid, store: OutcomeStore, orders: range) -> dict[tuple[int, int], int]:
    """Our predictions by (order, query), read back from the store."""
    found = store.read(group_name(grid.task, grid.unit))
    best = dict(zip(found.pairs(), found.log_p.argmax(axis=1).tolist(), strict=True))
    return {
        (order, query): best[grid.texts.pair(grid.prefixes[order], text)]
        for order in orders
        for query, text in enumerate(grid.queries)
    }


def _compared(baseline: Sequence[float], ours: Sequence[float]) -> Comparison:
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    return Comparison(
        baseline_s=statistics.median(baseline),
        ours_s=statistics.median(ours),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
    )


def _run(run: AblationRunner, unit: DemoSet) -> None:
    if not run.run_set(unit):
        raise SparsortError("the benchmark's own store is held by another process.")


def _items(sample: Sequence[tuple[int, range]]) -> list[tuple[int, int]]:
    return [(order, query) for order, queries in sample for query in queries]


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with icl/trec.train.jsonl, icl/trec.dev_subsample.jsonl and similar files"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--compile", action="store_true", help="compile the model for our side (needs a C++ compiler)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="TOML recipe of the study whose time is projected")
    add_output_options(parser)
    arguments = parser.parse_args()
    real, sizes = arguments.data is not None, QUICK if arguments.quick else FULL
    tasks: tuple[str | Task, ...] = ("trec",) if real else (REVIEWS,)
    folder = arguments.data or ROOT / "examples"
    bare = Ablation(
        tasks=tasks,
        data=folder,
        model=arguments.model,
        sets=1,
        shots=(K,),
        orderers=(),
        choosers=(),
        random_orders=ORDERS,
        test_rows=QUERIES,
        dev_rows=0,
        calibrated=(False,),
    )
    # There are too few reviews for the number of dev rows in the study.
    small: dict[str, Any] = {} if real else {"tasks": tasks, "dev_rows": BATCH}
    study = dataclasses.replace(Ablation.from_toml(arguments.recipe), data=folder, model=arguments.model, **small)
    name = f"ablation{'-compiled' if arguments.compile else ''}{'' if real else '-examples'}"
    report = Report(name, default_device().value)
    engine = Engine(bare, compile=arguments.compile)
    grid = Grid(bare, engine.loaded.tokenizer)
    measure_speed(report, grid, engine, sizes, real)
    measure_where(report, grid, engine)
    project_study(report, study, engine, sizes, real)
    measure_exactness(report, grid, sizes, arguments.model, arguments.compile)
    report.finish(arguments)


if __name__ == "__main__":
    main()
