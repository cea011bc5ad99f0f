# %% exercise:10.unfold
from lightlib.exercises import check


def unfold(T, mode):
    return T.movedim(mode, 0).reshape(T.shape[mode], -1)


check("10.unfold", unfold)


# %% exercise:10.mode_product
def mode_product(T, M, mode):
    return torch.tensordot(M, T, dims=([1], [mode])).movedim(0, mode)


check("10.mode_product", mode_product)


# %% exercise:10.tucker_numbers
def tucker_numbers(shape, ranks):
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


check("10.tucker_numbers", tucker_numbers)


# %% exercise:10.train_numbers
def train_numbers(shape, ranks):
    bonds = (1, *ranks, 1)
    return sum(bonds[k] * n * bonds[k + 1] for k, n in enumerate(shape))


check("10.train_numbers", train_numbers)


# %% exercise:10.ket_row
def ket_row(vectors, i):
    t = vectors.shape[1]
    return torch.kron(vectors[0, i // t], vectors[1, i % t])


check("10.ket_row", ket_row)
