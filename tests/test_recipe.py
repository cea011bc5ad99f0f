import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch

from lightlib.catalog import METHODS
from lightlib.quantization.grid import Int
from lightlib.quantization.rtn import rtn
from lightlib.recipe import compress, sweep


def logits(model, calib):
    with torch.no_grad():
        return model(calib[0]).logits


def mean_error(compressed):
    return compressed.reports.mean_error


def test_no_step_changes_nothing(llama, calib):
    light, report = compress(llama, [])
    assert light is not llama and torch.equal(logits(light, calib), logits(llama, calib)) and len(report) == 0


def test_one_step_is_the_method_itself(llama, calib):
    step = partial(rtn, grid=Int(4, group_size=16), progress=False)
    light, report = compress(llama, [step], calib)
    alone, rows = step(llama, calib)
    assert torch.equal(logits(light, calib), logits(alone, calib)) and report == rows


def test_the_source_stays_and_rows_of_all_steps_are_kept(llama, calib):
    before = logits(llama, calib)
    step = partial(rtn, grid=Int(4), progress=False)
    report = compress(llama, [step, step], calib).reports
    assert torch.equal(logits(llama, calib), before)
    assert len(report) == 14 and repr(report).startswith("rtn: 14 layers")
    assert compress(llama, [step], calib, inplace=True).model is llama


def test_a_failing_second_step_leaves_an_inplace_model_as_it_was(llama, calib):
    def fail(model, batches, inplace):
        raise RuntimeError("second step")

    before = logits(llama, calib)
    with pytest.raises(RuntimeError, match="second step"):
        compress(llama, [partial(rtn, grid=Int(2), progress=False), fail], calib, inplace=True)
    assert torch.equal(logits(llama, calib), before)


@pytest.mark.parametrize("pool", [None, "threads", "processes"])
def test_sweep_keeps_the_order_whichever_executor_runs_it(llama, pool):
    method = partial(rtn, llama, progress=False)
    grids = [Int(b) for b in (8, 4, 2)]
    if pool == "processes":
        executor = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    else:
        executor = ThreadPoolExecutor(2) if pool else None
    points = sweep(method, "grid", grids, executor, measure=mean_error)
    assert [p.value for p in points] == grids and {p.knob for p in points} == {"grid"}
    assert points[0].measured < points[1].measured < points[2].measured
    assert points[1].measured == mean_error(method(grid=Int(4)))


def test_the_catalogue_names_each_method_once_with_a_paper():
    names = [method.name for method in METHODS]
    assert len(names) == len(set(names))
    for method in METHODS:
        assert method.function.__name__ == method.name
        assert re.search(r"\b(19|20)\d\d\b.*(arXiv:\d{4}\.\d{4,5}|pages \d+-\d+)", method.paper)
