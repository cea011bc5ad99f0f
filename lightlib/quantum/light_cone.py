"""What a read-out of one qubit depends on: its Z followed back through the circuit, Pauli string by string.

CZs and CNOTs make one string of another (Gottesman 1998, arXiv:quant-ph/9807006). A Rot of any angles makes
all three of a qubit's X, Y or Z; then an upload turns X and Y, by x or -x, and leaves Z. So one sees, upload
by upload, what a ring undoes or does too late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from lightlib.quantum.circuit import Circuit
from lightlib.quantum.spectrum import check_qubit, whole_scales

# {(x, z): frequencies}: the bits of x are the qubits with X or Y, of z those with Z or Y; the bits of
# `frequencies` are those that the string has so far, bit 0 the lowest
Strings = dict[tuple[int, int], int]
MOST_STRINGS = 4**9


def reached(circuit: Circuit, qubit: int = 0) -> tuple[tuple[int, ...], ...]:
    """For each upload, from the first, the qubits on which it can change <Z_qubit>.

    Without entanglers only the qubit itself.
    """
    cones = [
        tuple(j for j in range(circuit.qubits) if any((x | z) >> j & 1 for x, z in strings))
        for strings in backwards(circuit, qubit, [0] * circuit.qubits)
    ]
    return tuple(cones[::-1])


def reached_frequencies(circuit: Circuit, qubit: int = 0, scales: Tensor | None = None) -> Tensor:
    """The frequencies (F), ascending, that <Z_qubit> has at almost all weights, for scales that are whole.

    Those of `spectrum.frequencies`, or fewer where rings cancel themselves or come after the last upload.
    """
    # a scale's sign does not change which frequencies there are
    steps = [abs(scale) for scale in whole_scales(circuit, scales)]
    *_, strings = backwards(circuit, qubit, steps)
    union, lowest = 0, -circuit.uploads * sum(steps)
    for found in strings.values():
        union |= found
    return torch.tensor(
        [lowest + i for i in range(union.bit_length()) if union >> i & 1], dtype=torch.float64
    )


def backwards(circuit: Circuit, qubit: int, steps: list[int]) -> Iterator[Strings]:
    """The strings just before each upload, from the last: what <Z_qubit> has become there."""
    check_qubit(circuit, qubit)
    if 4**circuit.qubits > MOST_STRINGS:
        raise ValueError(
            f"{circuit.qubits} qubits have 4^{circuit.qubits} Pauli strings: follow 9 qubits or fewer"
        )
    strings = {(0, 1 << qubit): 1 << circuit.uploads * sum(steps)}  # Z, at frequency 0
    for _ in range(circuit.uploads):
        for block in reversed(range(circuit.blocks)):
            # going back, the upload comes after the layer's first block
            strings = turned(ringed(circuit, block, strings), [0] * circuit.qubits if block else steps)
        yield strings


def ringed(circuit: Circuit, block: int, strings: Strings) -> dict[int, int]:
    """{qubits that a string touches: frequencies} on the other side of a ring, gate by gate."""
    found = defaultdict(int)
    for (x, z), frequencies in strings.items():
        for a, b in reversed(circuit.ring(block)):
            if circuit.entangler == "CZ":
                z ^= (x >> a & 1) << b | (x >> b & 1) << a
            else:
                x, z = x ^ (x >> a & 1) << b, z ^ (z >> b & 1) << a
        found[x | z] |= frequencies
    return found


def turned(touched: dict[int, int], steps: list[int]) -> Strings:
    """Any X, Y or Z on each qubit that is touched, as Rots make them; X and Y go steps[j] up and down."""
    found = {}
    for qubits, before in touched.items():
        for x in subsets(qubits):
            frequencies = before
            for j, step in enumerate(steps):
                if x >> j & 1:
                    frequencies = frequencies << step | frequencies >> step
            found |= {(x, qubits ^ x | y): frequencies for y in subsets(x)}
    return found


def subsets(bits: int) -> Iterator[int]:
    """Every whole number whose bits are among these."""
    some = bits
    while some:
        yield some
        some = (some - 1) & bits
    yield 0
