"""Beside the logits: a student's hidden states and attention maps held to its teacher's.

Hidden states through learned projections, and attention maps: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351.
The cosine of hidden states: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108.

A place of the stream is 0 in front of the first block, and i behind block i, counted from 1; behind the last
block it is read after the final norm, as transformers gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlib.decoder import find_blocks
from lightlib.quality import device_of

TOKENS = 8  # for each channel of a stream, to fit a projection on


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two streams (..., d_model), over positions and channels."""
    return F.mse_loss(student.float(), teacher.float())


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean cosine of two streams (..., d_model): from 0, one direction, to 2; lengths are free."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of attention weights (..., queries, keys), each row a distribution."""
    p, q = teacher.float(), student.float()
    # hidden keys have the weight 0 in both and count nothing
    return (torch.xlogy(p, p) - p * q.clamp_min(torch.finfo(q.dtype).tiny).log()).sum(-1).mean()


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the rows of squared differences of attention weights (..., queries, keys): from 0 to 2."""
    return (student.float() - teacher.float()).square().sum(-1).mean()


HIDDEN = {"mse": hidden_mse, "cosine": hidden_cosine}
ATTENTION = {"kl": attention_kl, "mse": attention_mse}


def even_places(student: int, teacher: int) -> dict[int, int]:
    """{place in a student of so many blocks: place in its teacher}, evenly, first to first, last to last.

    >>> even_places(2, 6)
    {0: 0, 1: 3, 2: 6}
    """
    return {i: round(i * teacher / student) for i in range(student + 1)}


def fit_projection(gram: Tensor, cross: Tensor, damping: float = 0.01) -> Tensor:
    """The W (D, d) with least ||X W^T - Y||^2 for streams X (n, d), Y (n, D), of which it asks the products.

    gram: X^T X (d, d), whose diagonal is raised by `damping` of its mean, for as few tokens as there may be.
    cross: Y^T X (D, d). At a damping of 0 a rotation is found exactly.
    """
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, cross.T).T.float().contiguous()


@dataclass(frozen=True)
class Match:
    """What inside of a student is held to its teacher's, and how much it weighs beside the logits' loss.

    hidden, attention: the weights of the two, each a mean over the places. places: {student's: teacher's};
    None: `even_places`. hidden_by, attention_by: "mse" or "cosine", "kl" or "mse". project: learn a map from
    the student's stream to the teacher's, which begins at its least squares and is dropped in the end; None:
    where the widths differ. Of different numbers of heads, the means over heads are compared.
    """

    hidden: float = 1.0
    attention: float = 0.0
    places: Mapping[int, int] | None = None
    hidden_by: str = "mse"
    attention_by: str = "kl"
    project: bool | None = None


@dataclass(frozen=True)
class Matching:
    """A `Match` for two models: its places, and the projections (D, d) that learn with the student."""

    match: Match
    places: dict[int, int]
    projections: dict[int, nn.Parameter]

    def wanted(self) -> dict[str, bool]:
        """What both models have to give beside their logits."""
        return {"output_hidden_states": True, "output_attentions": self.match.attention > 0}

    def loss(self, student, teacher) -> Tensor:
        """The weighted sum for what both models gave for the same ids; 0 for a teacher against itself."""
        match, total = self.match, 0.0
        if match.hidden:
            pairs = [(self.projected(student, i), teacher.hidden_states[j]) for i, j in self.places.items()]
            total = match.hidden * mean_of(HIDDEN[match.hidden_by], pairs)
        if match.attention:
            inside = [(i - 1, j - 1) for i, j in self.places.items() if i and j]
            pairs = [alike(student.attentions[i], teacher.attentions[j]) for i, j in inside]
            total = total + match.attention * mean_of(ATTENTION[match.attention_by], pairs)
        return total

    def projected(self, student, place: int) -> Tensor:
        """The student's stream at a place, as wide as the teacher's."""
        x = student.hidden_states[place].float()
        weight = self.projections.get(place)
        return x if weight is None else F.linear(x, weight.to(x.device))


def mean_of(loss, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(loss(x, y.to(x.device)) for x, y in pairs) / len(pairs)


def alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights (batch, heads, queries, keys) of both, or their means over heads (batch, 1, ...)."""
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def matching(match: Match, student: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> Matching:
    """`match` made ready for two models; projections are fitted on the first of the batches (batch, length).

    Raises ValueError for weights, names or places that do not fit.
    """
    places = check(match, len(find_blocks(student)), len(find_blocks(teacher)))
    if not match.hidden or match.project is False:
        return Matching(match, places, {})
    found = {}
    for i, (gram, cross) in products(student, teacher, batches, places).items():
        if match.project or len(gram) != len(cross):
            found[i] = nn.Parameter(fit_projection(gram, cross).to(device_of(student)))
    return Matching(match, places, found)


@torch.no_grad()
def products(
    student: nn.Module, teacher: nn.Module, batches: list[Tensor], places: dict[int, int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """{student's place: (X^T X, Y^T X)} of the streams there, from as many tokens as a projection needs."""
    found, seen = {}, 0
    for ids in batches:
        own, other = (
            one(ids.to(device_of(one)), use_cache=False, output_hidden_states=True).hidden_states
            for one in (student, teacher)
        )
        for i, j in places.items():
            x, y = (t.flatten(0, -2).double().cpu() for t in (own[i], other[j]))
            new = x.T @ x, y.T @ x
            found[i] = tuple(a + b for a, b in zip(found[i], new, strict=True)) if i in found else new
        seen += ids.numel()
        if seen >= TOKENS * max(len(gram) for gram, _ in found.values()):
            break
    return found


def check(match: Match, n_student: int, n_teacher: int) -> dict[int, int]:
    """The places, once the settings make sense."""
    if min(match.hidden, match.attention) < 0 or match.hidden + match.attention == 0:
        raise ValueError(f"hidden={match.hidden}, attention={match.attention}: give one a weight above 0")
    if match.hidden_by not in HIDDEN or match.attention_by not in ATTENTION:
        raise ValueError(
            f"hidden_by={match.hidden_by!r}, attention_by={match.attention_by!r}: choose from "
            f"{', '.join(HIDDEN)} and from {', '.join(ATTENTION)}"
        )
    places = even_places(n_student, n_teacher) if match.places is None else dict(match.places)
    for i, j in places.items():
        if not (0 <= i <= n_student and 0 <= j <= n_teacher):
            raise ValueError(
                f"places {i}: {j}: the student has 0 to {n_student}, the teacher 0 to {n_teacher}"
            )
        if (i == n_student) != (j == n_teacher):
            raise ValueError(
                f"places {i}: {j}: the last place is read after the final norm and only matches the last; "
                f"take {n_student}: {n_teacher}, or inner places for both"
            )
    if not places or (match.attention and not any(i and j for i, j in places.items())):
        raise ValueError("places name none to compare; attention needs one behind a block")
    return places


@contextmanager
def showing_attention(*models: nn.Module) -> Iterator[None]:
    """Within, attention is computed eagerly, the only way that gives its weights; then as before."""
    before = [(one, one.config._attn_implementation) for one in models]
    try:
        for one in models:
            one.set_attn_implementation("eager")
        yield
    finally:
        for one, implementation in before:
            one.set_attn_implementation(implementation)
