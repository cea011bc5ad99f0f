# %% exercise:01.scale
from lightlib.exercises import check


def scale_of(W):
    return W.abs().max() / 127


check("01.scale", scale_of)


# %% exercise:01.quantize
def quantize(row, scale):
    return (row / scale).round().clamp(-127, 127)


check("01.quantize", quantize)


# %% exercise:01.dequantize
def dequantize(codes, scale, zero):
    return (codes.float() - zero) * scale


check("01.dequantize", dequantize)


# %% exercise:01.zero_point
def zero_point(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return round(-low / scale)


check("01.zero_point", zero_point)

# %% exercise:01.bits_per_weight
bits_per_weight = (64 * 4 + 16 + 4) / 64
check("01.bits_per_weight", bits_per_weight)
