# %% exercise:20.rotate
from lightlib.exercises import check


def rotate(theta):
    return math.cos(theta / 2), math.sin(theta / 2)


check("20.rotate", rotate)


# %% exercise:20.expectation
def mean_z(a, b):
    return abs(a) ** 2 - abs(b) ** 2


check("20.expectation", mean_z)


# %% exercise:20.frequencies
def frequencies(scales, L):
    sums = {0}
    for scale in scales:
        sums = {s + scale * k for s in sums for k in range(-L, L + 1)}
    return len(sums)


check("20.frequencies", frequencies)


# %% exercise:20.shift
def derivative(f, theta):
    return (f(theta + math.pi / 2) - f(theta - math.pi / 2)) / 2


check("20.shift", derivative)


# %% exercise:20.state_bytes
def state_bytes(qubits, points):
    return points * 2**qubits * 8


check("20.state_bytes", state_bytes)
