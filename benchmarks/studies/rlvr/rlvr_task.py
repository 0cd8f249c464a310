"""A task with verifiable rewards that a tiny transformer learns on one core: answer a string of digits with the reversed string.

The length of the string, 1 to 12, grades the difficulty. A supervised warm start leaves short strings solved and long ones
unsolved; `Policy.update` then trains with GRPO, one update per batch of rollouts.

Shapes: B strings, T positions of a prompt or an answer (12), V tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST = 12
PAD, SEP, VOCABULARY = 10, 11, 12
WIDTH, HEADS, LAYERS = 64, 4, 2


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings of digits.

    Attributes:
        prompts: (B, T) digits, padded on the left.
        answers: (B, T) the reversed digits, padded on the right.
        lengths: (B,) number of digits.
    """

    prompts: Tensor
    answers: Tensor
    lengths: Tensor

    def at(self, rows: NDArray[np.int64] | Tensor) -> Strings:
        rows = torch.as_tensor(rows)
        return Strings(self.prompts[rows], self.answers[rows], self.lengths[rows])


def make_strings(lengths: NDArray[np.int64], rng: np.random.Generator) -> Strings:
    """Random strings of the given lengths, (B,)."""
    digits = torch.from_numpy(rng.integers(0, 10, (len(lengths), LONGEST)))
    place, length = torch.arange(LONGEST), torch.from_numpy(lengths)[:, None]
    # Reversing the answer gives a prompt whose last digit is the first of the answer.
    answers = torch.where(place < length, digits, PAD)
    return Strings(answers.flip(1), answers, length[:, 0])


class Transformer(nn.Module):
    """A causal transformer over prompt, SEP and answer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(2 * LONGEST + 1, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
                    ),
                }
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, tokens_BT: Tensor, caches: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits of the next digit (B, T, 10), and keys and values of all positions; `caches` has those of earlier ones."""
        start = caches[0].shape[3] if caches else 0
        batch, length = tokens_BT.shape
        state = self.token(tokens_BT) + self.place.weight[start : start + length]
        after: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            qkv = (
                layer["qkv"](layer["norm"](state)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            )
            keys_values = qkv[1:] if caches is None else torch.cat([caches[number], qkv[1:]], dim=3)
            after.append(keys_values)
            mixed = F.scaled_dot_product_attention(qkv[0], *keys_values, is_causal=length > 1)
            state = state + layer["out"](mixed.transpose(1, 2).reshape(batch, length, WIDTH))
            state = state + layer["mlp"](state)
        return self.head(self.norm(state)), after


class Policy:
    """A transformer and its optimiser.

    Args:
        seed: seed of the initial weights.
        rate: learning rate of Adam.
    """

    def __init__(self, seed: int, rate: float) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Transformer()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=rate)

    def log_probability(self, strings: Strings, answers_BT: Tensor) -> Tensor:
        """The log-probability of each digit of the answers, (B, T), 0 after the end of a string."""
        separator = torch.full((len(answers_BT), 1), SEP)
        tokens = torch.cat([strings.prompts, separator, answers_BT[:, :-1]], dim=1)
        logits = self.model(tokens)[0][:, LONGEST:]
        inside = torch.arange(LONGEST) < strings.lengths[:, None]
        chosen = answers_BT.clamp(max=9)[..., None]
        return torch.where(inside, logits.log_softmax(-1).gather(-1, chosen)[..., 0], 0.0)

    @torch.no_grad()
    def pass_rates(self, strings: Strings) -> NDArray[np.float64]:
        """The probability that a sampled answer is right, (B,): exact, without sampling."""
        return self.log_probability(strings, strings.answers).sum(1).double().exp().numpy()

    @torch.no_grad()
    def answer(self, strings: Strings, generator: torch.Generator) -> tuple[Tensor, NDArray[np.float64]]:
        """One sampled answer per string, (B, T), and its reward, (B,): 1 if it is the reversed string."""
        tokens = torch.cat([strings.prompts, torch.full((len(strings.prompts), 1), SEP)], dim=1)
        caches, digits = None, []
        for _ in range(LONGEST):
            logits, caches = self.model(tokens, caches)
            tokens = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
            digits.append(tokens)
        inside = torch.arange(LONGEST) < strings.lengths[:, None]
        answers = torch.where(inside, torch.cat(digits, dim=1), PAD)
        return answers, (answers == strings.answers).all(1).double().numpy()

    def imitate(self, strings: Strings) -> None:
        """One supervised step."""
        loss = -self.log_probability(strings, strings.answers).sum() / strings.lengths.sum()
        self._step(loss)

    def update(self, strings: Strings, answers_BT: Tensor, rewards: NDArray[np.float64], group: int) -> None:
        """One step of GRPO; consecutive `group` rows are rollouts of one prompt."""
        rewards_PG = torch.from_numpy(rewards).float().view(-1, group)
        advantages_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
        log_p_BT = self.log_probability(strings, answers_BT)
        loss = -(advantages_PG.reshape(-1, 1) * log_p_BT).sum() / strings.lengths.sum()
        self._step(loss)

    def _step(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()


def warm_start(seed: int, *, steps: int, rate: float, rng: np.random.Generator) -> Policy:
    """A policy that has imitated right answers, mostly of short strings: the length falls off by a third every digit."""
    policy = Policy(seed, rate)
    share = (2 / 3) ** np.arange(LONGEST)
    for step in range(steps):
        for group in policy.optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        policy.imitate(make_strings(rng.choice(np.arange(1, LONGEST + 1), 128, p=share / share.sum()), rng))
    return policy
