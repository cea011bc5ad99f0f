"""The harness itself: it passes what is right, stops at what is wrong, and measures what it says."""

import pytest
import torch

from lightlib.kernels import bench, harness, nvrtc, triton_driver
from lightlib.kernels.flash_attention import bench as attention_bench
from lightlib.kernels.flash_attention import op as attention_op
from lightlib.kernels.sparse_matmul import bench as sparse_bench
from lightlib.kernels.sparse_matmul import op
from lightlib.kernels.sparse_matmul.bench import pruned
from lightlib.kernels.sparse_matmul.launch import HERE
from lightlib.kernels.sparse_matmul.layouts import LAYOUTS
from lightlib.kernels.w4_matmul import bench as int_bench
from lightlib.kernels.w4_matmul import op as int_op


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_right_passes_and_what_is_wrong_is_named(layout, monkeypatch):
    assert 0 < sparse_bench.check(layout, "cpu") < 6e-3
    right = op.multiply

    def forgets_a_token(weight, x):
        y = right(weight, x).clone()
        y[-1] = 0
        return y

    monkeypatch.setattr(op, "multiply", forgets_a_token)
    with pytest.raises(AssertionError, match=f"{layout} 1 x 8, 1 tokens, 0% zeros"):
        sparse_bench.check(layout, "cpu")
    monkeypatch.setattr(op, "multiply", lambda weight, x: right(weight, x) * float("nan"))
    with pytest.raises(AssertionError, match=f"{layout} 1 x 8"):
        sparse_bench.check(layout, "cpu")


def test_integer_and_attention_checks_pass_and_stop(monkeypatch):
    assert 0 < int_bench.check(4, "cpu") < 6e-3 and 0 < int_bench.check(8, "cpu") < 6e-3
    assert 0 < attention_bench.check("cpu") < 1.2e-2
    right = int_op.multiply
    monkeypatch.setattr(int_op, "multiply", lambda weight, x: right(weight, x) * 1.02)
    with pytest.raises(AssertionError, match="int4 130 x 32, groups of 32, 1 tokens, zero: middle"):
        int_bench.check(4, "cpu")
    monkeypatch.setattr(attention_op, "decode", lambda q, k, v: q)
    with pytest.raises(AssertionError, match="decode"):
        attention_bench.check("cpu")


def test_memory_that_nobody_wrote_is_poisoned_only_inside():
    with harness.poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_floor_is_the_longer_of_moving_and_computing():
    limits = harness.Limits(copy_gb_per_s=1000, matmul_tflop_per_s=100)
    assert limits.floor_us(1e6, 0) == pytest.approx(1) and limits.floor_us(1e6, 3e8) == pytest.approx(3)


def test_a_pruned_weight_has_the_zeros_that_were_asked_for():
    W = pruned(500, 400, 0.7, torch.bfloat16, 0, "cpu")
    assert (W == 0).float().mean() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(W, pruned(500, 400, 0.7, torch.bfloat16, 0, "cpu"))


def test_uneven_zeros_leave_rows_alike_and_columns_not():
    W = pruned(500, 400, 0.7, torch.bfloat16, 0, "cpu", uneven=True) != 0
    assert set(W.sum(1).tolist()) == {120}
    share = W.float().mean(0)
    assert share.max() > 0.9 and share.min() < 0.1


def test_the_bench_covers_every_shape():
    shapes, tokens = bench.points(quick=False)
    assert shapes == list(bench.SHAPES.values()) and {1, 2, 16, 64} <= set(tokens)
    few, some = bench.points(quick=True)
    assert set(few) < set(shapes) and set(some) < set(tokens)


def test_every_bench_runs_to_its_end(monkeypatch):
    def once(calls, runs=0):
        for call in calls:
            assert torch.isfinite(call()).all()
        return harness.Timed(2.0, 1.0, 3.0, 9.0)

    limits = harness.Limits(copy_gb_per_s=1000, matmul_tflop_per_s=100)
    for module in (sparse_bench, int_bench, attention_bench):
        monkeypatch.setattr(module, "timed", once)
    for module in (sparse_bench, int_bench):
        monkeypatch.setattr(module, "copies_beyond_cache", lambda stored: 2)
    rows = list(sparse_bench.bench(64, 128, 0.5, (1, 8), limits, "cpu"))
    # a CPU has none of the baselines, and goes on without them
    assert [row.layout for row in rows] == ["cuBLAS", *LAYOUTS, "cuBLAS", "csl", "compact", "bitmap"]
    W, x = torch.randn(8, 16), torch.randn(3, 16)
    torch.testing.assert_close(sparse_bench.as_csr(W, x)[1](), W @ x.T)
    assert rows[0].gb_per_s == pytest.approx(64 * 128 * 2 / 2 / 1e3) and rows[0].times_cublas == 1
    assert rows[0].of_roofline == pytest.approx((64 * 128 * 2 + 2 * 192) / 1e6 / 2)
    rows = list(int_bench.bench(64, 128, (8,), limits, "cpu"))
    assert [row.kernel for row in rows] == ["cuBLAS", "int4", "int8"]
    assert rows[2].stored_bytes == 64 * 128 + 2 * 64
    shapes = {"prefill": (1, 4, 2, 32, 32, 64), "decode": (2, 4, 2, 1, 32, 64)}
    monkeypatch.setattr(attention_bench, "SHAPES", shapes)
    rows = list(attention_bench.bench(limits, "cpu"))
    assert [(row.kernel, row.name) for row in rows] == [(k, n) for n in shapes for k in ("SDPA", "ours")]
    assert rows[0].tflop_per_s == pytest.approx(2 * 4 * 32 * 32 * 64 / 2 / 1e6)
    assert rows[2].gb_per_s == pytest.approx(2 * 2 * 64 * (2 * 4 + 2 * 2 * 32) / 2 / 1e3)


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


@pytest.mark.parametrize(
    ("triton", "instead"),
    [("", "multiplied by slower Triton kernels"), ("Triton is not installed", "unpacked for each product")],
)
def test_without_nvrtc_others_take_over_and_the_reason_is_said_once(monkeypatch, recwarn, triton, instead):
    def gone():
        raise nvrtc.Unavailable("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "library", gone)
    monkeypatch.setattr(triton_driver, "missing", lambda: triton)
    op.missing.cache_clear()
    assert [op.missing(), op.missing()] == ["NVRTC was not found"] * 2
    assert [str(w.message) for w in recwarn] == [f"sparse weights are {instead}, since NVRTC was not found"]
    op.missing.cache_clear()
