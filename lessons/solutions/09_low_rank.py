# %% exercise:09.thin
from lightlib.exercises import check


def thin(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


check("09.thin", thin)


# %% exercise:09.break_even
def break_even(n_out, n_in):
    return n_out * n_in / (n_out + n_in)


check("09.break_even", break_even)


# %% exercise:09.main_outputs
def main_outputs(W, U):
    return U @ (U.T @ W)


check("09.main_outputs", main_outputs)


# %% exercise:09.rank_for_energy
def rank_for_energy(singular, share):
    held = singular.square().cumsum(0) / singular.square().sum()
    return int((held < share).sum()) + 1


check("09.rank_for_energy", rank_for_energy)
