# %% exercise:05.damage
from lightlib.exercises import check


def damage(w, H):
    return 0.5 * w**2 * H.diagonal()


check("05.damage", damage)


# %% exercise:05.surgeon
def surgeon(w, j, H):
    P = H.inverse()
    return w - w[j] / P[j, j] * P[j]


check("05.surgeon", surgeon)


# %% exercise:05.wanda_mask
def wanda_mask(W, norms, sparsity):
    scores = W.abs() * norms
    drop = scores.argsort(1)[:, : int(W.shape[1] * sparsity)]
    return torch.ones_like(W, dtype=torch.bool).scatter(1, drop, False)


check("05.wanda_mask", wanda_mask)


# %% exercise:05.two_of_four
def two_of_four(scores):
    groups = scores.view(len(scores), -1, 4)
    drop = groups.argsort(-1)[..., :2]
    return torch.ones_like(groups, dtype=torch.bool).scatter(-1, drop, False).view(scores.shape)


check("05.two_of_four", two_of_four)

# %% exercise:05.csr_pays
csr_pays = 1 - 16 / 48
check("05.csr_pays", csr_pays)
