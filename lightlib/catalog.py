"""Every method, a row each: what to call, where it comes from, what it compresses, and settings to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightlib.attention.gqa import share_heads
from lightlib.lowrank.compress_embedding import compress_embedding
from lightlib.lowrank.shared_tucker import tucker_across_layers
from lightlib.lowrank.svd import svd
from lightlib.lowrank.tensor_methods import cp, tensor_train, tucker
from lightlib.quantization.awq import awq
from lightlib.quantization.float_grids import FP8, NF4
from lightlib.quantization.gptq import gptq
from lightlib.quantization.grid import Int
from lightlib.quantization.llm_int8 import llm_int8
from lightlib.quantization.rtn import rtn
from lightlib.quantization.smoothquant import smoothquant
from lightlib.slicing.slicegpt import slicegpt
from lightlib.sparsity.magnitude import magnitude
from lightlib.sparsity.obs import obs
from lightlib.sparsity.sparsegpt import sparsegpt
from lightlib.sparsity.wanda import wanda
from lightlib.sparsity.wrp import wrp
from lightlib.structured.cfsp import cfsp
from lightlib.structured.depth import drop_blocks
from lightlib.structured.fisher_masks import fisher_masks
from lightlib.structured.llm_pruner import llm_pruner


@dataclass(frozen=True)
class Method:
    """`knobs`: for each keyword, values that work on a layer whose inputs are a multiple of 16.

    reshapes: what is left are dense weights of other shapes, so no layer is packed. refuses: model types that
    it refuses by name, since it cannot be applied to them.
    """

    name: str
    function: Callable
    paper: str
    compresses: str
    needs_data: bool
    knobs: dict[str, tuple]
    reshapes: bool = False
    refuses: tuple[str, ...] = ()


METHODS = (
    Method(
        "rtn",
        rtn,
        "Jacob et al. 2018, arXiv:1712.05877",
        "the blocks' linear weights, to integers of 2 to 8 bits, NF4 or FP8",
        needs_data=False,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(8),
                Int(3, group_size=16),
                Int(2, symmetric=True),
                Int(8, per_tensor=True, symmetric=True),
                Int(4, group_size=16, float_zero=True),
                NF4(group_size=16),
                FP8("e4m3", group_size=16),
                FP8("e5m2", group_size=None, per_tensor=True),
            )
        },
    ),
    Method(
        "gptq",
        gptq,
        "Frantar et al. 2022, arXiv:2210.17323",
        "the blocks' linear weights, with errors passed on to weights not rounded yet",
        needs_data=True,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(3),
                Int(2, group_size=16, symmetric=True),
                Int(8),
                NF4(group_size=16),
            ),
            "act_order": (True,),
            "static_groups": (True,),
            "true_sequential": (True,),
            "damping": (0.1,),
        },
    ),
    Method(
        "awq",
        awq,
        "Lin et al. 2023, arXiv:2306.00978",
        "the blocks' linear weights, with the channels that carry most stretched before rounding",
        needs_data=True,
        knobs={
            "grid": (
                Int(4, group_size=16),
                Int(3),
                Int(4, group_size=16, symmetric=True),
                NF4(group_size=16),
            ),
            "clip": (False,),
            "steps": (5,),
        },
    ),
    Method(
        "llm_int8",
        llm_int8,
        "Dettmers et al. 2022, arXiv:2208.07339",
        "the blocks' linear weights and inputs, to 8 bits, outlier columns apart in 16",
        needs_data=False,
        knobs={"threshold": (6.0, 1.0), "dynamic": (False,)},
    ),
    Method(
        "smoothquant",
        smoothquant,
        "Xiao et al. 2022, arXiv:2211.10438",
        "the blocks' linear weights and inputs, to 8 bits, outliers moved into the weights",
        needs_data=True,
        knobs={
            "alpha": (0.5, "search", None),
            "activations": ("token", "tensor", "static"),
            "per_tensor": (True,),
            "everywhere": (True,),
        },
    ),
    Method(
        "magnitude",
        magnitude,
        "Han et al. 2015, arXiv:1506.02626",
        "the blocks' linear weights, the smallest dropped",
        needs_data=False,
        knobs={"sparsity": (0.5, 0.9, "2:4", "1:8"), "scope": ("row", "layer", "global")},
    ),
    Method(
        "wanda",
        wanda,
        "Sun et al. 2023, arXiv:2306.11695",
        "the blocks' linear weights, those dropped that are small times their input's norm",
        needs_data=True,
        knobs={"sparsity": (0.5, 0.7, "2:4", "4:8")},
    ),
    Method(
        "sparsegpt",
        sparsegpt,
        "Frantar & Alistarh 2023, arXiv:2301.00774",
        "the blocks' linear weights, with what is dropped made up for by what stays",
        needs_data=True,
        knobs={"sparsity": (0.5, 0.7, "2:4", "4:8"), "damping": (0.1,), "block_size": (16,)},
    ),
    Method(
        "obs",
        obs,
        "Hassibi & Stork 1993; Frantar & Alistarh 2022, arXiv:2208.11580",
        "the blocks' linear weights, one dropped at a time and the others moved to their best",
        needs_data=True,
        knobs={"sparsity": (0.5,), "surgeon": (False,), "damping": (0.1,)},
    ),
    Method(
        "wrp",
        wrp,
        "Weight Recover Prune, ACL 2024, pages 6433-6443",
        "the blocks' linear weights, to 2:4 and the most important of the others back",
        needs_data=True,
        knobs={"alpha": (0.25, 0.0), "pattern": ("1:4",)},
    ),
    Method(
        "svd",
        svd,
        "Eckart & Young 1936; Wang et al. 2024, arXiv:2403.07378",
        "the blocks' linear weights, to the directions in which most of their outputs lie",
        needs_data=True,
        knobs={"fraction": (0.3, 0.6), "weighing": ("norm", None), "pivot": (False,), "round_to": (8,)},
        reshapes=True,
    ),
    Method(
        "tensor_train",
        tensor_train,
        "Oseledets 2011, SIAM J. Sci. Comput. 33(5); Novikov et al. 2015, arXiv:1509.06569",
        "the blocks' linear weights, each a chain of small cores",
        needs_data=False,
        knobs={"fraction": (0.3, 0.8), "order": (2, 4)},
    ),
    Method(
        "tucker",
        tucker,
        "De Lathauwer et al. 2000, SIAM J. Matrix Anal. Appl. 21(4), pages 1253-1278",
        "the blocks' linear weights, each a core and a matrix for every mode",
        needs_data=False,
        knobs={"fraction": (0.3, 0.7), "heads": (False,), "order": (2,), "sweeps": (0,)},
    ),
    Method(
        "cp",
        cp,
        "Carroll & Chang 1970; Harshman 1970; Kolda & Bader 2009, SIAM Review 51(3), pages 455-500",
        "the blocks' linear weights, each a sum of outer products of three vectors",
        needs_data=False,
        knobs={
            "fraction": (0.3, 0.8),
            "heads": (False,),
            "slices": (2, 5),
            "sweeps": (2,),
            "seed": (1,),
        },
    ),
    Method(
        "tucker_across_layers",
        tucker_across_layers,
        "Tucker 1966; Ye 2005, Machine Learning 61, pages 167-191",
        "the same linear weight of all blocks, with bases that all share and a core for each",
        needs_data=False,
        knobs={"fraction": (0.3, 0.7), "sweeps": (0,)},
        reshapes=True,
    ),
    Method(
        "compress_embedding",
        compress_embedding,
        "Khrulkov et al. 2019, arXiv:1901.10787; Panahi et al. 2020, arXiv:1911.04975; Gan et al. 2022, "
        "arXiv:2210.15379",
        "the embedding, and a head that shares its weight",
        needs_data=False,
        knobs={
            "kind": ("low_rank", "tt", "word2ketxs"),
            "ratio": (2.0,),
            "weighting": ("frequency",),
            "dense_rows": (3,),
        },
        reshapes=True,
    ),
    Method(
        "slicegpt",
        slicegpt,
        "Ashkboos et al. 2024, arXiv:2401.15024",
        "the whole stream with all that reads and writes it, to its principal directions",
        needs_data=True,
        knobs={
            "slice_fraction": (0.5, 0.25),
            "explained_variance": (0.9,),
            "rotations": ("block",),
            "signal": ("normed",),
            "slice_head": (True,),
        },
        reshapes=True,
    ),
    Method(
        "llm_pruner",
        llm_pruner,
        "Ma et al. 2023, arXiv:2305.11627",
        "whole heads and neurons, those with which the loss would move least",
        needs_data=True,
        knobs={
            "fraction": (0.5, 0.25),
            "importance": ("second", "mixed", "vector", "magnitude", "random"),
            "aggregate": ("max", "product", "last"),
            "kinds": (("neurons",), ("heads",)),
            "across": ("model",),
            "round_to": (16,),
        },
        reshapes=True,
    ),
    Method(
        "fisher_masks",
        fisher_masks,
        "Kwon et al. 2022, arXiv:2204.09656",
        "whole heads and neurons within a budget, by masks that are searched, rearranged and tuned",
        needs_data=True,
        knobs={
            "fraction": (0.4,),
            "rearrange": (False,),
            "tune": (False,),
            "kinds": (("neurons",),),
            "round_to": (16,),
            "shrinkage": (0.0,),
            "damp": (0.1,),
        },
        reshapes=True,
    ),
    Method(
        "cfsp",
        cfsp,
        "Wang et al. 2025, arXiv:2409.13199",
        "whole neurons, a budget for each block by how far it turns the stream",
        needs_data=True,
        knobs={
            "round_to": (16,),
            "fraction": (0.5,),
            "score": ("activation", "weights"),
            "sharpness": (1.6384,),
            "power": (0.5,),
        },
        reshapes=True,
    ),
    Method(
        "drop_blocks",
        drop_blocks,
        "Gromov et al. 2024, arXiv:2403.17887; Men et al. 2024, arXiv:2403.03853",
        "whole blocks, those that turn the stream least",
        needs_data=True,
        knobs={"count": (1,), "choose": ("single",), "tokens": ("last",)},
        reshapes=True,
    ),
    Method(
        "share_heads",
        share_heads,
        "Ainslie et al. 2023, arXiv:2305.13245",
        "key and value heads, one for a group of query heads, and with them the cache",
        needs_data=False,
        knobs={"kv_heads": (1, 2), "how": ("mean", "aligned")},
        reshapes=True,
        refuses=("opt", "gpt2", "gpt_neox"),
    ),
)
