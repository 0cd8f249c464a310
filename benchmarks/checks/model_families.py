"""Which model families work: a tiny model of every causal language model class of transformers, against a plain loop.

    python benchmarks/checks/model_families.py --save             # all families, 20 minutes; writes the table in the docs
    python benchmarks/checks/model_families.py --resume OUTCOMES  # the same in parts: families in the file are not run again
    python benchmarks/checks/model_families.py llama opt gpt2     # some of them, printed

For each family the script creates a model with random weights and compares four things with a loop that runs one text at a time
through the model's own forward pass: the sparsity of the last state, the loss on an answer, the log-probabilities of labels,
and greedy text. The outcome is one of

* equal: all four agree (log-probabilities to 1e-3 nats in fp32, texts token for token);
* refused: sparsort declines the model with one sentence before it does any work;
* different or crash: a fault of sparsort. There must be none;
* not built: transformers itself cannot build or run the tiny model on a CPU, with the reason.

Every family runs in a separate process, because some change global state when they are imported.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, machine
from model_families_configs import tiny_config, tiny_tokenizer

from sparsort import EntropyScorer, LossScorer, SparsityScorer
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import generate
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.scorers.sparsity import ModelScorer
from sparsort.storage.files import write_atomically, write_json

PAGE = Path(__file__).parents[2] / "docs" / "results" / "model-families.md"
ROWS = [
    {"q": "How many apples are left?", "a": "five of them"},
    {"q": "What is 2 + 3? A question of one line", "a": "5"},
    {"q": "Paris is the capital of France, and Rome?", "a": "of Italy"},
]
CHUNKS = ["Question: Is it so? yes\n", "Question: Are they? no\n"]
QUERIES = ["Question: How many apples?", "Question: What is the capital of Italy, or of France?"]
LABELS = [" yes", " no", " maybe not"]
NEW_TOKENS = 6
# A family takes a few seconds; the limit leaves room for a loaded machine.
SECONDS = 600
# Limit on the address space: a configuration that was not shrunk must not exhaust the machine.
MOST_BYTES = 6 * 2**30
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one family: `kind` is "equal", "refused", "different", "crash" or "not built"."""

    family: str
    model_class: str
    kind: str
    detail: str = ""
    prompts: str = ""


def families() -> list[str]:
    """The model types that `AutoModelForCausalLM` maps to a class, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_family(family: str) -> Outcome:
    """Build the family's tiny model and compare sparsort with the plain loop."""
    tokenizer = tiny_tokenizer()
    try:
        model = build(family, tokenizer)
    except Exception as error:  # noqa: BLE001  any error of transformers is the outcome
        return Outcome(family=family, model_class=class_of(family), kind="not built", detail=_sentence(error))
    name = type(model).__name__
    try:
        ours = Ours(model, tokenizer)
        # A model of which only the head is refused still has a scorer, and is compared below.
        if ours.refusal and not ours.scorers:
            return Outcome(family=family, model_class=name, kind="refused", detail=ours.refusal)
        problems = ours.differences(PlainLoop(model, tokenizer).everything())
    except Exception as error:  # noqa: BLE001  a crash is the outcome
        detail = f"{type(error).__name__}: {_sentence(error)}"
        return Outcome(family=family, model_class=name, kind="crash", detail=detail)
    if problems:
        return Outcome(family=family, model_class=name, kind="different", detail="; ".join(problems))
    kind = "refused" if ours.refusal else "equal"
    return Outcome(family=family, model_class=name, kind=kind, detail=ours.refusal, prompts=ours.prompts)


def class_of(family: str) -> str:
    """The name of the class that `AutoModelForCausalLM` makes for a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def build(family: str, tokenizer: Any) -> Any:
    """A causal language model of the family with random weights, in fp32."""
    return build_from(tiny_config(family, len(tokenizer)))


def build_from(config: Any) -> Any:
    """A causal language model of this configuration with random weights, in fp32."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    make = AutoModelForCausalLM.from_config
    if isinstance(getattr(config, "decoder", None), model_class.config_class):
        # MusicGen's class takes the decoder's part of the configuration.
        config, make = config.decoder, model_class._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                # Norms start at 1 or 0, and some families initialise whole projections with 0, which would hide a fault.
                if weight.is_floating_point():
                    weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    return model.eval()


class PlainLoop:
    """The oracle: the model's own forward pass over one whole text at a time, without a cache."""

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
        """Gini of the last state of `output_hidden_states`."""
        states = self.forward(ids).hidden_states[-1]
        if states.dim() != 3:
            # Gemma 3n lists several streams of states here, which it joins for the head.
            with torch.inference_mode():
                states = self.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        return gini_of(states[0, -1])

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
        """Greedy tokens, each from a pass over the whole text."""
        written: list[int] = []
        while len(written) < NEW_TOKENS:
            written.append(int(self.forward(ids + written).logits[0, -1].argmax()))
            if written[-1] == self.tokenizer.eos_token_id:
                break
        return written


def gini_of(state_H: torch.Tensor) -> float:
    """The Gini coefficient of the magnitudes of one state, in float64, from its definition over sorted values."""
    # Float64, so that the oracle's rounding is far below the tolerance.
    state = state_H.double().abs().sort().values
    width = len(state)
    ranks = torch.arange(1, width + 1, dtype=torch.float64)
    return float(2 * (ranks * state).sum() / (width * state.sum()) - (width + 1) / width)


class Ours:
    """The results of sparsort for a model.

    The constructor creates all readers before any text is read, and must be where a model is refused.

    Attributes:
        scorers: name → scorer.
        reader: scores answers and generates texts; None if the model is refused.
        refusal: the sentence with which sparsort declines the model or its head; "" if it declines neither.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.scorers: dict[str, ModelScorer] = {}
        self.reader: AnswerReader | None = None
        self.refusal = ""
        try:
            sparsity = SparsityScorer(model, tokenizer=tokenizer, site="pre_norm")
            # `output_hidden_states` has the last state after the final norm, if the model has one.
            if sparsity.backbone.final_norm is not None:
                sparsity = SparsityScorer(model, tokenizer=tokenizer, site="post_norm")
            self.scorers["gini"] = sparsity
            head = {
                "loss": LossScorer(model, tokenizer=tokenizer),
                "entropy": EntropyScorer(model, tokenizer=tokenizer),
            }
            self.reader = AnswerReader(load_model(model, tokenizer=tokenizer))
            self.scorers |= head
        except SparsortError as error:
            self.refusal = _sentence(error)

    @property
    def prompts(self) -> str:
        """How prompts of answers are run, with the reason."""
        return self.reader.implementation if self.reader is not None else ""

    def differences(self, expected: dict[str, Any]) -> list[str]:
        """The differences between sparsort and the plain loop, in all that sparsort does not decline."""
        ours: dict[str, Any] = {
            name: scorer.score(ROWS, prompt="{q}", **{"answer": " {a}"} if name == "loss" else {}).difficulty.tolist()
            for name, scorer in self.scorers.items()
        }
        if self.reader is not None:
            ours["log_p"] = self.reader.answers(CHUNKS, QUERIES, LABELS).log_p.tolist()
        problems = []
        for name, values in ours.items():
            gap = float((torch.tensor(values) - torch.tensor(expected[name])).abs().max())
            # Not `gap > TOLERANCE`, which is false for NaN.
            if not gap <= TOLERANCE:
                problems.append(f"{name} differs by {gap:.3g}")
        if self.reader is not None:
            written = generate(self.reader, CHUNKS, QUERIES, max_new_tokens=NEW_TOKENS).ids
            if written != expected["greedy"]:
                problems.append(f"greedy tokens differ: {written} and {expected['greedy']}")
        return problems


def run_apart(families: Sequence[str]) -> Iterator[Outcome]:
    """Run `check_family` for each family in a separate process with a time limit."""
    context = multiprocessing.get_context("fork")
    for family in families:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, family))
        process.start()
        # Without this, the pipe would stay open after the death of the child, and `recv` would wait forever.
        sender.close()
        try:
            if receiver.poll(SECONDS):
                yield Outcome(**receiver.recv())
            else:
                yield _crash(family, f"no result within {SECONDS} s")
        except EOFError:
            process.join()
            yield _crash(family, f"the process ended with {process.exitcode}")
        finally:
            process.kill()
            process.join()


def _crash(family: str, detail: str) -> Outcome:
    return Outcome(family=family, model_class=class_of(family), kind="crash", detail=detail)


def _send(sender: Any, family: str) -> None:
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    sender.send(asdict(check_family(family)))


def quiet() -> None:
    """Silence the warnings of transformers about tiny configurations."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("sparsort").setLevel(logging.ERROR)


def _sentence(error: Exception) -> str:
    """The error's text on one line of bounded length, without the name of a validator in front."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition("ValueError: ")[2][:300]


def page(outcomes: Sequence[Outcome], described: dict[str, Any]) -> str:
    """The page for the documentation."""
    counts = Counter(outcome.kind for outcome in outcomes)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("equal", "refused", "not built", "different", "crash"))
    version = described["packages"]["transformers"]
    lines = [
        "# Which model families work",
        "",
        f"Written by `python benchmarks/checks/model_families.py --save` with transformers {version}: every class of "
        "`AutoModelForCausalLM`, built from a tiny configuration with random weights in fp32 on a CPU, and compared with a plain "
        "loop that runs one whole text at a time through the model's own forward pass.",
        "",
        "- *equal*: the sparsity of the last state, the loss and the entropy, the log-probabilities of labels and greedy texts "
        f"agree, numbers to {TOLERANCE:g} and texts token for token. The detail says how prompts are run: queries after shared "
        "prefixes, or whole prompts with the reason, which is slower and gives the same numbers.",
        "- *refused*: sparsort declines the model, or its losses and answers, with the sentence given and before it reads any "
        "text. The sparsity of a model of which only the head is refused was compared and agrees.",
        "- *not built*: transformers does not build the tiny model here, for the reason given.",
        "- *different*, *crash*: faults of sparsort.",
        "",
        f"{len(outcomes)} families: {summary}.",
        "",
        "| family | class | outcome | detail |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        detail = (outcome.detail or outcome.prompts).replace("|", "\\|")
        lines.append(f"| {outcome.family} | {outcome.model_class} | {outcome.kind} | {detail} |")
    return "\n".join(lines) + "\n"


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The outcomes of an earlier, unfinished run, by family."""
    if not path.exists():
        return {}
    outcomes = [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {outcome.family: outcome for outcome in outcomes}


def main() -> None:
    """Check the families and print, or save, the outcome of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, such as llama [default: all]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write the page in docs/ and benchmarks/results/")
    parser.add_argument("--here", action="store_true", help="run in this process instead of one per family")
    parser.add_argument(
        "--resume", type=Path, help="a file of outcomes: families in it are skipped, others are appended"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := sorted(set(args.families) - set(families())):
        sys.exit(f"transformers has no causal language model of the type {unknown[0]!r}.")
    if args.save and args.families:
        sys.exit("--save writes the table of all families. Omit the families.")
    asked = args.families or families()
    known = read_outcomes(args.resume) if args.resume else {}
    missing = [family for family in asked if family not in known]
    for outcome in map(check_family, missing) if args.here else run_apart(missing):
        known[outcome.family] = outcome
        print(f"{outcome.family:28} {outcome.kind:10} {outcome.detail or outcome.prompts}", file=sys.stderr, flush=True)
        if args.resume:
            with args.resume.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(asdict(outcome)) + "\n")
    outcomes = [known[family] for family in asked]
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
