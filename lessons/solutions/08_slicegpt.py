# %% exercise:08.fold_scale
from lightlib.exercises import check


def fold_scale(W, scale):
    return W * scale


check("08.fold_scale", fold_scale)


# %% exercise:08.reader
def reader(W, Q):
    return W @ Q


check("08.reader", reader)


# %% exercise:08.writer
def writer(W, Q):
    return Q.T @ W


check("08.writer", writer)


# %% exercise:08.shortcut
def shortcut(Q1, Q2, k):
    return Q1[:, :k].T @ Q2[:, :k]


check("08.shortcut", shortcut)

# %% exercise:08.pays_from
r = 2 * 576**2 / 3_538_944
pays_from = (1 + 2 * r - (1 + 4 * r) ** 0.5) / (2 * r)
check("08.pays_from", pays_from)
