"""The exercises of all lessons, by name: "NN.what"."""

from lightlib.exercise_data import (
    distillation,
    kv_compression,
    low_rank,
    numbers,
    outliers,
    pruning,
    quantum,
    shared_attention,
    slicegpt,
    sparse_kernels,
    start_here,
    structured,
    tensor_networks,
    weight_only,
)
from lightlib.exercise_data.exercise import Exercise

EXERCISES: dict[str, Exercise] = (
    start_here.EXERCISES
    | numbers.EXERCISES
    | outliers.EXERCISES
    | weight_only.EXERCISES
    | pruning.EXERCISES
    | sparse_kernels.EXERCISES
    | structured.EXERCISES
    | slicegpt.EXERCISES
    | low_rank.EXERCISES
    | tensor_networks.EXERCISES
    | distillation.EXERCISES
    | shared_attention.EXERCISES
    | kv_compression.EXERCISES
    | quantum.EXERCISES
)
