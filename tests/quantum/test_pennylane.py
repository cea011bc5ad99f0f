import subprocess
import sys
from time import perf_counter

import pennylane as qml
import pytest
import torch
from torch.testing import assert_close

from lightlib.quantum.circuit import Circuit, run
from lightlib.quantum.pennylane_circuit import draw, qnode
from tests.quantum.test_circuit import drawn, every_entangler


def gradients(of, weights, x):
    weights, x = (t.clone().requires_grad_() for t in (weights, x))
    z = of(weights, x)
    # unequal shares, so that no qubit stands for another
    (z * torch.arange(1.0, z.numel() + 1).view_as(z)).sum().backward()
    return z.detach(), weights.grad, x.grad


@every_entangler
@pytest.mark.parametrize("qubits", [1, 2, 3, 4, 5, 6])
def test_pennylane_gives_the_same_values_and_gradients(qubits, entangler):
    circuit = Circuit(qubits, 2, 2, entangler)
    weights, x = drawn(circuit, qubits)  # as many points as qubits: where an axis may be mistaken unseen
    assert_close(
        gradients(qnode(circuit), weights, x),
        gradients(lambda w, a: run(circuit, w, a), weights, x),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("entangler", ["CZ", "CNOT"])
@pytest.mark.parametrize("qubits", [1, 2, 3, 4])
def test_a_parameter_layer_is_pennylanes_strongly_entangling_layers(qubits, entangler):
    circuit = Circuit(qubits, 1, 4, entangler)
    weights, x = drawn(circuit)
    gate = qml.CZ if entangler == "CZ" else qml.CNOT

    @qml.qnode(qml.device("default.qubit", wires=qubits), interface="torch")
    def node():
        for upload, layer in enumerate(weights):
            if upload:
                qml.AngleEmbedding(x, wires=range(qubits), rotation="Z")
            qml.StronglyEntanglingLayers(layer, wires=range(qubits), imprimitive=gate)
        return [qml.expval(qml.Z(j)) for j in range(qubits)]

    assert_close(torch.stack(node()), run(circuit, weights, x))


def test_any_leading_shape_and_precision_comes_back_from_pennylane():
    circuit = Circuit(2, entangler="CNOT")
    weights, x = drawn(circuit, 2, 3)
    assert_close(qnode(circuit)(weights, x), run(circuit, weights, x))
    assert_close(qnode(circuit)(weights, x[0, 0]), run(circuit, weights, x[0, 0]))
    assert qnode(circuit)(weights.float(), x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="last dimension"):
        qnode(circuit)(weights, x[..., :1])


def test_the_drawing_shows_every_gate():
    import matplotlib.pyplot as plt

    figure = draw(Circuit(3, uploads=2, blocks=1, entangler="CNOT"))
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words.count("Rot") == 9 and words.count("RZ") == 6
    plt.close(figure)


def test_without_pennylane_the_sentence_says_how_it_comes(monkeypatch):
    monkeypatch.setitem(sys.modules, "pennylane", None)
    for of in (qnode, draw):
        with pytest.raises(ImportError, match=r"PennyLane is not installed.*\[lab\]"):
            of(Circuit(2))


def test_circuits_run_where_pennylane_is_not_even_imported():
    program = (
        "import sys; sys.modules['pennylane'] = None; sys.modules['matplotlib'] = None\n"
        "import torch\n"
        "import lightlib.quantum.light_cone, lightlib.quantum.noise, lightlib.quantum.pennylane_circuit\n"
        "from lightlib.quantum.circuit import Circuit, run\n"
        "print(run(Circuit(2), torch.zeros(2, 2, 2, 3), torch.zeros(2)).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[1.0, 1.0]"


def quickest(of, weights, x, times):
    seconds = []
    for _ in range(times):
        begin = perf_counter()
        of(weights, x).sum().backward()
        seconds.append(perf_counter() - begin)
    return min(seconds)


@pytest.mark.alone
def test_there_and_back_is_twenty_times_faster_than_pennylane():
    circuit, threads = Circuit(6, uploads=2, blocks=2), torch.get_num_threads()
    weights, x = (t.requires_grad_() for t in drawn(circuit, 1000, dtype=torch.float32))
    try:
        torch.set_num_threads(1)
        theirs = quickest(qnode(circuit), weights, x, 4)
        ours = quickest(lambda w, a: run(circuit, w, a), weights, x, 12)
    finally:
        torch.set_num_threads(threads)
    print(f"PennyLane {theirs * 1e3:.1f} ms, lightlib {ours * 1e3:.1f} ms")
    assert theirs > 20 * ours
