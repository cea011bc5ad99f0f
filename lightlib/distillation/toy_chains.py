"""A toy language with topics, and a student too small for it: what forward and reverse KL make it say.

A Markov chain over symbols is a language model that can be known whole: nothing here is sampled but strings.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightlib.distillation.losses import kl

Loss = Callable[[Tensor, Tensor], Tensor]
ALPHABETS = (string.ascii_lowercase, string.ascii_uppercase, string.digits)


@dataclass(frozen=True)
class Language:
    """A teacher: log-probabilities (V, V) of each next symbol, which pairs are valid, each symbol's topic."""

    log_p: Tensor
    valid: Tensor
    topic: Tensor
    symbols: str


def language(
    topics: int = 3, size: int = 10, *, branches: int = 3, switch: float = 0.02, noise: float = 1e-3,
    seed: int = 0,
) -> Language:  # fmt: skip
    """Topics of `size` symbols each, by turns small letters, capitals, digits.

    Each symbol is followed by one of `branches` others of its own topic, or with probability `switch` by the
    first of another's. These pairs are valid; any pair has a share of `noise`, so that no divergence is
    infinite.
    """
    if not 2 <= topics <= len(ALPHABETS) or not 1 <= branches < size <= 10:
        raise ValueError(
            f"topics={topics}, size={size}, branches={branches}: give 2 or 3 topics of up to 10 symbols, "
            "each followed by fewer"
        )
    V, generator = topics * size, torch.Generator().manual_seed(seed)
    topic = torch.arange(V) // size
    P = torch.zeros(V, V, dtype=torch.float64)
    for i in range(V):
        # 1 to size - 1 places on, round the topic: none follows itself
        steps = torch.randperm(size - 1, generator=generator)[:branches] + 1
        follows = (i + steps) % size + topic[i] * size
        P[i, follows] = (1 - switch) / branches
        P[i, [other * size for other in range(topics) if other != topic[i]]] = switch / (topics - 1)
    valid = P > 0
    P = (1 - noise) * P + noise / V
    return Language(P.log(), valid, topic, "".join(a[:size] for a in ALPHABETS[:topics]))


def stationary(P: Tensor) -> Tensor:
    """The share of time pi (V) that a chain P (V, V) spends in each state: pi P = pi; gradients pass."""
    V = len(P)
    # one equation follows from the others; the shares' sum takes its place
    system = torch.cat([(P.T - torch.eye(V).to(P))[:-1], torch.ones(1, V).to(P)])
    return torch.linalg.solve(system, torch.eye(V).to(P)[-1])


def rate(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of endless strings in nats a symbol: at the states that a visits. 0 where they are equal."""
    return stationary(log_a.exp()) @ kl(log_a, log_b)


def forward_rate(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(teacher || student): on what the teacher writes."""
    return rate(log_p, log_q)


def reverse_rate(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher): on what the student writes."""
    return rate(log_q, log_p)


@dataclass(frozen=True)
class Student:
    """softmax(A B^T + c): A and B (V, rank), c (V). Rank 0 knows how frequent symbols are, and no order."""

    A: Tensor
    B: Tensor
    c: Tensor

    @property
    def log_q(self) -> Tensor:
        """Log-probabilities (V, V) of each next symbol."""
        return (self.A @ self.B.T + self.c).log_softmax(-1)


def untrained(teacher: Language, rank: int, seed: int = 0) -> Student:
    """A student who writes nearly all symbols alike. Raises ValueError for a rank that is none."""
    V = len(teacher.log_p)
    if not 0 <= rank <= V:
        raise ValueError(f"rank={rank} does not lie from 0 to {V}, the number of symbols")
    generator = torch.Generator().manual_seed(seed)
    A, B = 0.3 * torch.randn(2, V, rank, generator=generator, dtype=torch.float64)
    return Student(A, B, torch.zeros(V, dtype=torch.float64))


def train_chain(
    student: Student, teacher: Language, loss: Loss = forward_rate, *, steps: int = 400, lr: float = 0.05
) -> Student:
    """The student after `steps` of Adam down loss(log_p, log_q), which is exact; 0 steps change nothing."""
    learning = [t.clone().requires_grad_(True) for t in (student.A, student.B, student.c)]
    optimizer = torch.optim.Adam(learning, lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(teacher.log_p, Student(*learning).log_q).backward()
            optimizer.step()
    return Student(*(t.detach() for t in learning))


@dataclass(frozen=True)
class Writing:
    """What a chain writes, from its stationary distribution; no sample."""

    invalid_share: float  # of its pairs, those that the teacher's grammar does not have
    entropy_bits: float  # of the next symbol
    topics: float  # exp of the entropy of the topics' shares: how many it writes of, 1 to all
    topic_shares: tuple[float, ...]


def writing(log_q: Tensor, teacher: Language) -> Writing:
    """Measure a chain (V, V) against the teacher's grammar. The teacher's own noise is invalid too."""
    Q = log_q.exp()
    pairs = stationary(Q)[:, None] * Q  # (V, V), sum 1
    shares = torch.zeros(int(teacher.topic.max()) + 1).double().index_add(0, teacher.topic, pairs.sum(1))
    shares = shares.clamp_min(0)
    return Writing(
        invalid_share=pairs[~teacher.valid].sum().item(),
        entropy_bits=-(pairs * log_q).sum().item() / math.log(2),
        topics=math.exp(-torch.xlogy(shares, shares).sum().item()),
        topic_shares=tuple(shares.tolist()),
    )


def write(log_q: Tensor, teacher: Language, length: int, generator: torch.Generator) -> str:
    """A string of the chain, from a state that it is found in."""
    Q = log_q.exp()
    state, said = torch.multinomial(stationary(Q).clamp_min(0), 1, generator=generator), []
    for _ in range(length):
        said.append(teacher.symbols[int(state)])
        state = torch.multinomial(Q[state].flatten(), 1, generator=generator)
    return "".join(said)
