"""The harness itself: it passes what is right, stops at what is wrong, and measures what it says."""

import pytest
import torch

from lightlib.kernels import bench, harness, nvrtc
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.launch import HERE


@pytest.mark.parametrize("layout", ["csl", "bitmap"])
def test_what_is_right_passes_and_what_is_wrong_is_named(layout, monkeypatch):
    assert 0 < harness.check(layout, "cpu") < 6e-3
    right = getattr(op, f"{layout}_matmul")

    def forgets_a_token(*args):
        y = right(*args).clone()
        y[-1] = 0
        return y

    monkeypatch.setattr(op, f"{layout}_matmul", forgets_a_token)
    with pytest.raises(AssertionError, match=f"{layout} 1 x 8, 1 tokens, 0% zeros"):
        harness.check(layout, "cpu")
    monkeypatch.setattr(op, f"{layout}_matmul", lambda *args: right(*args) * float("nan"))
    with pytest.raises(AssertionError, match=f"{layout} 1 x 8"):
        harness.check(layout, "cpu")


def test_a_pruned_weight_has_the_zeros_that_were_asked_for():
    W = harness.pruned(500, 400, 0.7, torch.bfloat16, 0, "cpu")
    assert (W == 0).float().mean() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(W, harness.pruned(500, 400, 0.7, torch.bfloat16, 0, "cpu"))


def test_the_bench_covers_every_shape_and_both_layouts():
    points = bench.points(quick=False)
    assert len(points) == len(set(points)) == 4 * 5 * 5 * 2
    assert {point[1:3] for point in points} == set(bench.SHAPES.values())
    assert set(bench.points(quick=True)) <= set(points)


def test_without_a_gpu_the_bench_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit, match="no CUDA device is here"):
        bench.main()


def has_nvrtc() -> bool:
    try:
        nvrtc.library()
    except nvrtc.Unavailable:
        return False
    return True


@pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC, which torch's CUDA wheels bring")
def test_nvrtc_makes_machine_code_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTLIB_HOME", str(tmp_path))
    macros = {"BN": 8, "VECTORS": 4, "BF16": 1}
    code = nvrtc.cached_cubin(HERE / "csl_v4.cu", "sm_90", macros)
    assert code.startswith(b"\x7fELF") and b"csl_v4" in code
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_bytes(b"from the cache")
    assert nvrtc.cached_cubin(HERE / "csl_v4.cu", "sm_90", macros) == b"from the cache"
    assert nvrtc.cached_cubin(HERE / "csl_v4.cu", "sm_80", macros).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r"csl_v4.cu does not compile for sm_90:(.|\n)*VECTORS"):
        nvrtc.compile_cubin(HERE / "csl_v4.cu", "sm_90", {"BN": 8})


def test_headers_are_found_through_headers():
    assert set(nvrtc.included(HERE / "csl_v4.cu")) == {"csl_pipeline.h", "tile.h"}
    assert nvrtc.included(HERE / "csl_v1.cu") == {}


def test_without_nvrtc_weights_are_unpacked_and_the_reason_is_said_once(monkeypatch, recwarn):
    def gone():
        raise nvrtc.Unavailable("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "library", gone)
    op.missing.cache_clear()
    assert [op.missing(), op.missing()] == ["NVRTC was not found"] * 2
    assert [str(w.message) for w in recwarn] == [
        "sparse weights are unpacked for each product, since NVRTC was not found"
    ]
    op.missing.cache_clear()
