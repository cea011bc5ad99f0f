# %% exercise:03.output_error
from lightlib.exercises import check


def output_error(W, W2, gram):
    D = W - W2
    return ((D @ gram * D).sum() / (W @ gram * W).sum()).sqrt()


check("03.output_error", output_error)


# %% exercise:03.compensate
def compensate(w, q, gram):
    move = torch.linalg.solve(gram[1:, 1:], gram[1:, 0])
    return w[1:] + (w[0] - q) * move


check("03.compensate", compensate)


# %% exercise:03.channel_scale
def channel_scale(magnitude, exponent):
    scale = magnitude**exponent
    return scale / (scale.max() * scale.min()).sqrt()


check("03.channel_scale", channel_scale)


# %% exercise:03.scaled_rounding
def scaled_rounding(W, s, step):
    return (W * s / step).round() * step / s


check("03.scaled_rounding", scaled_rounding)

# %% exercise:03.nf4_bits
nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
check("03.nf4_bits", nf4_bits)
