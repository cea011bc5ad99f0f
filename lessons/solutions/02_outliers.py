# %% exercise:02.erased
from lightlib.exercises import check

erased = 3000 / 127 / 2
check("02.erased", erased)


# %% exercise:02.product
def product(qx, sx, qw, sw):
    return (qx.int() @ qw.int().T) * sx * sw.T


check("02.product", product)


# %% exercise:02.bits
bits = (8 * 576 * 1536 + 16 * 576 + 15 * (16 * 576 + 32)) / (576 * 1536)
check("02.bits", bits)


# %% exercise:02.smooth
def smooth_by(X, W, alpha):
    return X.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)


check("02.smooth", smooth_by)
