"""The commands that `golden.py` compares, and the inputs that they read.

Each case writes to `{out}`, a path named after the case; a later case may read an earlier one's as `{work}/<case>`.
`{inputs}` holds the shipped examples, two tiny models with fixed random weights, and small task files. Nothing here
imports sparsort, so the same inputs serve any version of it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REVIEW = ("-p", "Review: {text}\nSentiment:", "-a", " {label}")
QUESTION = ("-p", "Question: {question}\nAnswer:", "-a", " {answer}")
LLAMA, GEMMA = ("-m", "{inputs}/llama"), ("-m", "{inputs}/gemma3")
REVIEWS, FEW, GRADED = "{inputs}/reviews.jsonl", "{inputs}/few.jsonl", "{inputs}/graded.jsonl"


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        name: names the case and its output.
        arguments: what follows `sparsort`.
    """

    name: str
    arguments: tuple[str, ...]


def _score() -> list[Case]:
    score = ("score", REVIEWS, *REVIEW, "--out", "{out}", "--json")
    asked = ("score", REVIEWS, *REVIEW[:2], "--out", "{out}", "--json")
    cases = [
        Case(f"score-{scorer}", (*score, *LLAMA, "--scorer", scorer))
        for scorer in ("sparsity", "answer_loss", "entropy", "length")
    ]
    cases += [
        Case("score-prompt_loss", (*asked, *LLAMA, "--scorer", "prompt_loss")),
        Case("score-compression", (*score, "--scorer", "compression")),
        Case("score-random", (*asked, "--scorer", "random", "--seed", "5")),
    ]
    cases += [
        Case(f"score-{site.replace(':', '-')}-{pooling}", (*score, *model, "--site", site, "--pooling", pooling))
        for model, site, pooling in (
            (LLAMA, "post_norm", "mean_metric"),
            (LLAMA, "mlp", "answer"),
            (GEMMA, "pre_norm", "mean_state"),
            (GEMMA, "layer:1", "last"),
            (GEMMA, "mlp:0", "mean_metric"),
        )
    ]
    cases += [
        Case("score-outliers-drop", (*score, *LLAMA, "--outliers", "drop:3", "--metric", "hoyer")),
        Case("score-outliers-rms", (*score, *GEMMA, "--outliers", "rms", "--metric", "effective_rank_energy")),
        Case("score-chat", (*score, *LLAMA, "--chat", "--system", "Be brief.")),
        Case("score-truncated", (*score, *LLAMA, "--max-length", "24", "--truncation", "left")),
        Case(
            "score-column",
            ("score", GRADED, "--scorer", "column", "--column", "steps", "--out", "{out}", "--json"),
        ),
        Case("score-shards", (*score, *LLAMA, "--shard-rows", "48")),
        Case("score-demo", ("score", FEW, *REVIEW, "--out", "{out}", "--json")),
    ]
    return cases


def _order() -> list[Case]:
    query = ("--query", "The handle broke within a week, and nobody answered my letters.", "--json")
    order = ("order", REVIEWS, *REVIEW, *LLAMA, *query, "-k", "6")
    few = ("order", FEW, *REVIEW, *query)
    orders = (
        "sparse_to_dense",
        "dense_to_sparse",
        "easy_to_hard",
        "hard_to_easy",
        "u_shape",
        "inverted_u",
        "similarity_ascending",
        "similarity_descending",
        "reverse:u_shape",
    )
    plain_orders = ("length_ascending", "length_descending", "random", "given")
    selectors = {
        "random": (),
        "first": (),
        "ids": ("--ids", "r003,r001,r010"),
        "balanced": ("--label", "label"),
        "bm25": (),
        "knn": (),
        "mmr": (),
        "kdpp": (),
        "vote_k": (),
        "spread": (),
        "difficulty_matched": (),
    }
    cases = [Case(f"order-{name.replace(':', '-')}", (*few, *LLAMA, "--order", name)) for name in orders]
    cases += [Case(f"order-{name}", (*few, "--order", name)) for name in plain_orders]
    loss = ("--order", "perplexity_ascending", "--scorer", "answer_loss")
    cases += [Case("order-perplexity", (*few, *LLAMA, *loss))]
    cases += [Case(f"select-{name}", (*order, "--select", name, *more)) for name, more in selectors.items()]
    cases += [
        Case("order-budget", (*order, "--max-tokens", "160", "--drop", "longest")),
        Case("order-chat", (*order, "--chat", "--system", "Be brief.")),
        Case("order-scores", (*order, "--select", "knn", "--scores", "{work}/score-answer_loss")),
        Case("order-demo", ("order", FEW, *REVIEW, *query, "-k", "4", "--select", "knn")),
    ]
    return [
        Case(case.name, tuple(part for part in case.arguments if part != "-k" and part != "6"))
        if case.name == "select-ids"
        else case
        for case in cases
    ]


def _choose() -> list[Case]:
    choose = ("choose", REVIEWS, *REVIEW, "--label", "label", *LLAMA, "--orders", "6", "--json", "-k", "4")
    queries = ("--max-queries", "8")
    criteria = (
        "globale_unlabelled",
        "locale_unlabelled",
        "pdo",
        "best_on_dev",
        "best_on_dev_likelihood",
        "density",
        "density_gain",
        "density_rank",
        "density+locale_unlabelled",
    )
    out = ("--out", "{out}.jsonl")
    cases = [Case(f"choose-{name}", (*choose, *queries, "--criterion", name, *out)) for name in criteria]
    cases.append(Case("choose-pdo_null", (*choose, "--criterion", "pdo_null", *out)))
    # Probes are sampled from the model, and a model with random weights writes none that reads as a query.
    demo = ("choose", FEW, *REVIEW, "--label", "label", "--orders", "4", "--json", "-k", "4")
    cases += [Case(f"choose-{name}", (*demo, "--criterion", name, *out)) for name in ("globale", "locale")]
    cases += [
        Case(f"choose-prior-{prior}", (*choose, *queries, "--criterion", "pdo", "--prior", prior))
        for prior in ("uniform", "pool", "mixed")
    ]
    return cases


def _plan() -> list[Case]:
    scores = ("plan", "{work}/score-column", "--data", GRADED, "--out", "{out}", "--json")
    drawn = ("--seed", "3")
    settings: dict[str, tuple[str, ...]] = {
        "sorted": ("--batch-size", "8"),
        "hard": ("--batch-size", "8", "--direction", "hard_to_easy", "--stages", "4", *drawn),
        "folded": ("--batch-size", "8", "--schedule", "folded", "--folds", "3"),
        "interleaved": ("--batch-size", "8", "--schedule", "interleaved"),
        "shuffle": ("--batch-size", "7", "--schedule", "shuffle", "--later-epochs", "shuffle", *drawn),
        "warm-up": ("--batch-size", "8", "--warm-up", "0.5", "--later-epochs", "shuffle", *drawn),
        "groups": ("--batch-size", "8", "--groups", "kind", "--stages", "2", *drawn),
        "packed": ("--batch-size", "4", "--packing", "best_fit", "--pack-length", "128", "--lengths", "steps"),
        "next-fit": ("--batch-size", "4", "--packing", "next_fit", "--pack-length", "32", "--lengths", "steps"),
        "by-length": ("--batch-size", "8", "--stages", "3", "--group-by-length", "--lengths", "steps"),
        "quota": ("--batch-size", "8", "--mode", "pool", "--groups", "kind", "--steps", "40", "--pacing", "linear"),
    }
    cases = [Case(f"plan-{name}", (*scores, *more)) for name, more in settings.items()]
    pool = (*scores, "--batch-size", "8", "--mode", "pool", "--steps", "30")
    cases += [
        Case(f"plan-pacing-{name}", (*pool, "--pacing", name, *drawn))
        for name in (
            "constant",
            "linear",
            "root",
            "quadratic",
            "step",
            "exponential",
            "logarithmic",
            "geometric",
            "competence",
            "baby_steps",
        )
    ]
    cases.append(Case("plan-pacing-settings", (*pool, "--pacing", "root:start=0.2,until=0.5")))
    both = ("plan", "loss={work}/score-answer_loss", "length={work}/score-length", "--out", "{out}", "--json")
    cases += [
        Case(f"plan-combine-{name}", (*both, "--batch-size", "8", "--combination", name))
        for name in ("rank_average", "lexicographic", "intersection")
    ]
    cases.append(Case("plan-weighted", (*both, "--batch-size", "8", "--weight", "loss=2", "--weight", "length=1")))
    return cases


def _calibrate() -> list[Case]:
    calibrate = ("calibrate", GRADED, *QUESTION, *LLAMA, "--draws", "100", "--out", "{out}.json", "--json")
    return [
        Case("calibrate", calibrate),
        Case("calibrate-level", (*calibrate, "--level", "steps", "--target", "level", "--no-loss", "--sites", "mlp")),
    ]


def _ablate() -> list[Case]:
    ablate = ("ablate", REVIEWS, *REVIEW[:2], "--label", "label", *LLAMA, "--out", "{out}", "--json", "--no-report")
    small = ("-k", "4", "--sets", "2", "--random-orders", "4", "--test-rows", "12", "--dev-rows", "6")
    return [
        Case("ablate-labels", (*ablate, *small)),
        Case("ablate-selectors", (*ablate, *small, "--selectors", "knn,topk_mdl,spread", "--contextual", "off")),
        Case(
            "ablate-written",
            (
                *("ablate", GRADED, "-p", "Question: {question}\nAnswer:", "--label", "answer", *LLAMA, *small),
                *("--judge", "exact", "--max-new-tokens", "4", "--out", "{out}", "--json", "--no-report"),
            ),
        ),
        Case("report", ("report", "{work}/ablate-labels", "--out", "{out}", "--json")),
    ]


def _train() -> list[Case]:
    train = ("train", GRADED, "--text", "{question}\n{answer}", "--out", "{out}", "--json", "--max-length", "128")
    steps = ("--max-steps", "6", "--batch-size", "8")
    return [
        Case("train-plan", (*train, *steps, "--scores", "{work}/score-column", "--stages", "4")),
        Case(
            "train-online",
            (
                *train,
                *steps,
                "--scores",
                "{work}/score-column",
                "--online",
                "--mode",
                "pool",
                "--pacing",
                "linear:start=0.3",
            ),
        ),
        *(
            Case(f"train-{recipe}", (*train, *steps, "--recipe", recipe, "--schedule", "shuffle"))
            for recipe in ("sparse", "sparse_moba", "sparse_nsa", "sparse_window")
        ),
    ]


CASES: tuple[Case, ...] = (*_score(), *_order(), *_choose(), *_plan(), *_calibrate(), *_ablate(), *_train())


def prepare(folder: Path, examples: Path) -> None:
    """Write the examples and the tiny models to `folder`."""
    folder.mkdir(parents=True)
    for name in ("reviews.jsonl", "graded.jsonl"):
        shutil.copy(examples / name, folder / name)
    lines = (examples / "reviews.jsonl").read_text().splitlines()[:12]
    (folder / "few.jsonl").write_text("\n".join(lines) + "\n")
    words = [" ".join(str(value) for value in json.loads(line).values()) for line in lines]
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
    }
    _save_model(folder / "llama", "llama", shape, words)
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    _save_model(folder / "gemma3", "gemma3_text", {**shape, **window, "query_pre_attn_scalar": 16}, words)


def _save_model(folder: Path, model_type: str, shape: dict[str, Any], words: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
