# %% exercise:07.cut_mlp
from lightlib.exercises import check


def cut_mlp(x, gate, up, down, kept):
    hidden = torch.nn.functional.silu(x @ gate[kept].T) * (x @ up[kept].T)
    return hidden @ down[:, kept].T


check("07.cut_mlp", cut_mlp)

# %% exercise:07.head_weights
head_weights = 576 * (3 * 64 + 64 + 64 + 3 * 64)
check("07.head_weights", head_weights)


# %% exercise:07.first_order
def first_order(W, g):
    return (W * g).abs().sum(1)


check("07.first_order", first_order)


# %% exercise:07.angle
def angle(x, y):
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return cosine.clamp(-1, 1).arccos() / torch.pi


check("07.angle", angle)
