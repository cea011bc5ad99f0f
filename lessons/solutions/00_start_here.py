# %% exercise:00.kv_bytes
from lightlib.exercises import check

kv_bytes = 2 * 32 * 8 * 128 * 8192 * 2
check("00.kv_bytes", kv_bytes)

# %% exercise:00.weight_bytes
weight_bytes = 8_030_261_248 * (4 + 16 / 64) / 8
check("00.weight_bytes", weight_bytes)


# %% exercise:00.fastest
def fastest(weight_bytes, kv_bytes, bytes_per_second):
    return bytes_per_second / (weight_bytes + kv_bytes)


check("00.fastest", fastest)


# %% exercise:00.total_ms
def total_ms(ttft_ms, tpot_ms, new):
    return ttft_ms + tpot_ms * new


check("00.total_ms", total_ms)
