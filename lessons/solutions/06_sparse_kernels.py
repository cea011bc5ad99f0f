# %% exercise:06.unpack
from lightlib.exercises import check


def unpack(words, n_out, n_in):
    tile = torch.zeros(n_out * n_in, dtype=torch.int16)
    tile[words >> 16] = (words & 0xFFFF).to(torch.int16)
    return tile.view(n_out, n_in)


check("06.unpack", unpack)


# %% exercise:06.turns
def turns(slots):
    return (slots // 2 % 32).bincount().max()


check("06.turns", turns)


# %% exercise:06.place
def place(mask, i):
    return (mask & ((1 << i) - 1)).bit_count()


check("06.place", place)


# %% exercise:06.step_us
def step_us(load, extract, multiply, buffers):
    work = extract + multiply
    return load + work if buffers == 1 else max(load, work)


check("06.step_us", step_us)

# %% exercise:06.pays_from
pays_from = 1 - 2 * 8 / 25
check("06.pays_from", pays_from)
