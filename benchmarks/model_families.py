"""Which model families work: every causal language model class of transformers, built tiny, against a plain loop.

    python benchmarks/model_families.py --save          # all families, some minutes; writes the table in the docs
    python benchmarks/model_families.py llama opt gpt2  # some of them, printed

For each family the script makes a model with random weights and compares four things with a loop that runs one text at a time
through the model's own forward pass: the sparsity of the last state, the loss on an answer, the log-probabilities of labels,
and greedy text. The outcome is one of

* equal: all four agree (log-probabilities to 1e-3 nats in fp32, texts token for token);
* refused: sparsort declines the model with one sentence before it does any work;
* different or crash: a fault of sparsort. There must be none;
* not built: transformers itself cannot build or run the tiny model on a CPU, with the reason.

Every family runs in a process of its own, because some of them change global state when they are imported.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import RESULTS, machine
from model_families_configs import tiny_config, tiny_tokenizer

from sparsort import EntropyScorer, LossScorer, SparsityScorer
from sparsort.errors import SparsortError
from sparsort.files import write_atomically, write_json
from sparsort.scoring.answers import AnswerReader
from sparsort.scoring.generation import generate
from sparsort.scoring.loading import load_model

PAGE = Path(__file__).parents[1] / "docs" / "results" / "model-families.md"
ROWS = [
    {"q": "How many apples are left?", "a": "five of them"},
    {"q": "What is 2 + 3? A question of one line", "a": "5"},
    {"q": "Paris is the capital of France, and Rome?", "a": "of Italy"},
]
CHUNKS = ["Question: Is it so? yes\n", "Question: Are they? no\n"]
QUERIES = ["Question: How many apples?", "Question: What is the capital of Italy, or of France?"]
LABELS = [" yes", " no", " maybe not"]
NEW_TOKENS = 6
SECONDS = 180
MOST_BYTES = 6 * 2**30  # of address space: a configuration that did not shrink must not take the machine
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family: `kind` is "equal", "refused", "different", "crash" or "not built"."""

    family: str
    model_class: str
    kind: str
    detail: str = ""


def families() -> list[str]:
    """The model types that `AutoModelForCausalLM` maps to a class, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_family(family: str) -> Outcome:
    """Build the family's tiny model and compare sparsort with the plain loop."""
    tokenizer = tiny_tokenizer()
    name = family
    try:
        model = build(family, tokenizer)
        name = type(model).__name__
        plain = PlainLoop(model, tokenizer)
        expected = plain.everything()
    except Exception as error:  # noqa: BLE001  whatever transformers cannot do is the outcome
        return Outcome(family=family, model_class=name, kind="not built", detail=_first_line(error))
    try:
        problems = differences(model, tokenizer, expected)
    except SparsortError as error:
        return Outcome(family=family, model_class=name, kind="refused", detail=_first_line(error))
    except Exception as error:  # noqa: BLE001  a crash is the outcome
        return Outcome(
            family=family, model_class=name, kind="crash", detail=f"{type(error).__name__}: {_first_line(error)}"
        )
    kind = "different" if problems else "equal"
    return Outcome(family=family, model_class=name, kind=kind, detail="; ".join(problems))


def build(family: str, tokenizer: Any) -> Any:
    """A causal language model of the family with random weights, in fp32."""
    return build_from(tiny_config(family, len(tokenizer)))


def build_from(config: Any) -> Any:
    """A causal language model of this configuration with random weights, in fp32."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                # Norms start at 1 or 0, and some families start whole projections at 0: a fault there would not show.
                if weight.is_floating_point():
                    weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    return model.eval()


class PlainLoop:
    """The oracle: one text at a time, whole, without a cache, through the model's own forward pass."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def everything(self) -> dict[str, Any]:
        """Gini of the last state, loss and entropy, label log-probabilities, and greedy tokens."""
        return {
            "gini": [self.gini(self.ids(row["q"])) for row in ROWS],
            "loss": [self.loss(row["q"], " " + row["a"]) for row in ROWS],
            "entropy": [self.entropy(self.ids(row["q"])) for row in ROWS],
            "log_p": [[self.log_p("".join(CHUNKS) + query, label) for label in LABELS] for query in QUERIES],
            "greedy": [self.greedy(self.ids("".join(CHUNKS) + query)) for query in QUERIES],
        }

    def ids(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens in front."""
        return list(self.tokenizer(text)["input_ids"])

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> Any:
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)

    def gini(self, ids: Sequence[int]) -> float:
        """Gini of the state that `output_hidden_states` gives last."""
        return gini_of(self.forward(ids).hidden_states[-1][0, -1])

    def log_softmax(self, ids: Sequence[int]) -> torch.Tensor:
        logits = self.forward(ids).logits[0].double()
        return logits.log_softmax(dim=-1)

    def entropy(self, ids: Sequence[int]) -> float:
        last = self.log_softmax(ids)[-1]
        return float(-(last.exp() * last).sum())

    def loss(self, prompt: str, answer: str) -> float:
        """Mean negative log-likelihood of the answer's tokens."""
        whole, start = self.ids(prompt + answer), len(self.ids(prompt))
        return -self.log_p(prompt, answer) / (len(whole) - start)

    def log_p(self, prompt: str, answer: str) -> float:
        """Summed log-probability of the answer; no token of these texts straddles the border."""
        whole, before = self.ids(prompt + answer), self.ids(prompt)
        assert whole[: len(before)] == before, "the texts were chosen so that no token straddles the border"
        log_p = self.log_softmax(whole)
        return float(sum(log_p[place - 1, whole[place]] for place in range(len(before), len(whole))))

    def greedy(self, ids: list[int]) -> list[int]:
        """The likeliest next tokens, each from a pass over the whole text."""
        written: list[int] = []
        while len(written) < NEW_TOKENS:
            written.append(int(self.forward(ids + written).logits[0, -1].argmax()))
            if written[-1] == self.tokenizer.eos_token_id:
                break
        return written


def gini_of(state_H: torch.Tensor) -> float:
    """The Gini coefficient of the magnitudes of one state, in float64, from its definition over sorted values."""
    state = state_H.double().abs().sort().values
    width = len(state)
    ranks = torch.arange(1, width + 1, dtype=torch.float64)
    return float(2 * (ranks * state).sum() / (width * state.sum()) - (width + 1) / width)


def differences(model: Any, tokenizer: Any, expected: dict[str, Any]) -> list[str]:
    """Where sparsort does not give what the plain loop gave.

    Raises:
        SparsortError: sparsort refuses the model.
    """
    sparsity = SparsityScorer(model, tokenizer=tokenizer, site="pre_norm")
    if sparsity.backbone.final_norm is not None:
        sparsity = SparsityScorer(model, tokenizer=tokenizer, site="post_norm")
    loss, entropy = LossScorer(model, tokenizer=tokenizer), EntropyScorer(model, tokenizer=tokenizer)
    reader = AnswerReader(load_model(model, tokenizer=tokenizer))
    ours = {
        "gini": sparsity.score(ROWS, prompt="{q}").difficulty.tolist(),
        "loss": loss.score(ROWS, prompt="{q}", answer=" {a}").difficulty.tolist(),
        "entropy": entropy.score(ROWS, prompt="{q}").difficulty.tolist(),
        "log_p": reader.answers(CHUNKS, QUERIES, LABELS).log_p.tolist(),
    }
    problems = []
    for name, values in ours.items():
        gap = float((torch.tensor(values) - torch.tensor(expected[name])).abs().max())
        if not gap <= TOLERANCE:
            problems.append(f"{name} differs by {gap:.3g}")
    written = generate(reader, CHUNKS, QUERIES, max_new_tokens=NEW_TOKENS).ids
    if written != expected["greedy"]:
        problems.append(f"greedy tokens differ: {written} and {expected['greedy']}")
    return problems


def run_apart(family: str) -> Outcome:
    """`check_family` in a process of its own, with a limit on its time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, family))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Outcome(**receiver.recv())
        return Outcome(family=family, model_class=family, kind="crash", detail=f"no result within {SECONDS} s")
    except EOFError:
        process.join()
        return Outcome(
            family=family, model_class=family, kind="crash", detail=f"the process ended with {process.exitcode}"
        )
    finally:
        process.kill()
        process.join()


def _send(sender: Any, family: str) -> None:
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    sender.send(asdict(check_family(family)))


def quiet() -> None:
    """Keep the remarks of transformers about tiny configurations out of the output."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("sparsort").setLevel(logging.ERROR)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def page(outcomes: Sequence[Outcome], described: dict[str, Any]) -> str:
    """The table of the docs."""
    counts = Counter(outcome.kind for outcome in outcomes)
    shown = ", ".join(f"{counts[kind]} {kind}" for kind in ("equal", "refused", "not built", "different", "crash"))
    version = described["packages"]["transformers"]
    lines = [
        "# Which model families work",
        "",
        f"Made by `python benchmarks/model_families.py --save` with transformers {version}: every class that "
        "`AutoModelForCausalLM` knows, built from a tiny configuration with random weights in fp32 on a CPU. *Equal* means that "
        "the sparsity of the last state, the loss and entropy of the head, the log-probabilities of labels, and greedy text "
        "agree with a plain loop over whole texts. *Refused* means that sparsort declines the model with the sentence given, "
        "before it does any work. *Not built* means that the tiny model did not run in transformers itself.",
        "",
        f"{len(outcomes)} families: {shown}.",
        "",
        "| family | class | outcome | detail |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|")
        lines.append(f"| {outcome.family} | {outcome.model_class} | {outcome.kind} | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the families and print, or save, what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, such as llama [default: all]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write the page in docs/ and benchmarks/results/")
    parser.add_argument("--here", action="store_true", help="no processes of their own, and tracebacks: for debugging")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := sorted(set(args.families) - set(families())):
        sys.exit(f"transformers has no causal language model of the type {unknown[0]!r}.")
    outcomes = []
    for family in args.families or families():
        outcomes.append(check_family(family) if args.here else run_apart(family))
        last = outcomes[-1]
        print(f"{last.family:28} {last.kind:10} {last.detail}", file=sys.stderr, flush=True)
    described = machine(torch.device("cpu"))
    found = {"machine": described, "outcomes": [asdict(outcome) for outcome in outcomes]}
    if args.json:
        print(json.dumps(found, indent=2))
    if args.save:
        write_json(RESULTS / "model-families.json", found)
        with write_atomically(PAGE) as temporary:
            temporary.write_text(page(outcomes, described), encoding="utf-8")
        print(PAGE, file=sys.stderr)
    if any(outcome.kind in ("different", "crash") for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
