"""The exercises of lesson 00."""

from lightlib.exercise_data.exercise import Exercise

KV = 2 * 32 * 8 * 128 * 8192 * 2
WEIGHTS = 8_030_261_248

EXERCISES = {
    "00.kv_bytes": Exercise(
        "How many bytes is the KV cache of LLaMA-3-8B (32 layers; 32 heads of 128 numbers that share 8 "
        "key-value heads) for one sequence of 8,192 tokens, in 16 bits?",
        KV,
        slips=(
            (KV / 2, "that is half of it: both keys and values are kept."),
            (KV * 4, "that is four times too much: 32 heads ask, but only 8 key-value heads are kept."),
            (KV * 8, "those are bits; a byte has 8 of them."),
            (KV / 32, "that is one layer; every layer keeps its own keys and values."),
            (KV / 1e9, "that is in GB; the answer is asked for in bytes."),
            (KV / 2**30, "that is in GiB; the answer is asked for in bytes."),
        ),
        hints=(
            "multiply: keys and values, layers, key-value heads, numbers a head, tokens, bytes a number.",
            "2 x 32 x 8 x 128 x 8192 x 2.",
        ),
    ),
    "00.weight_bytes": Exercise(
        "LLaMA-3-8B has 8,030,261,248 parameters. How many bytes are they in 4-bit codes with one 16-bit "
        "scale for every 64 of them?",
        WEIGHTS * 4.25 / 8,
        slips=(
            (WEIGHTS * 4.25, "those are bits; a byte has 8 of them."),
            (WEIGHTS * 4 / 8, "those are the codes alone; every 64 weights have a scale of 16 bits."),
            (WEIGHTS * 20 / 8, "that gives every weight a scale of its own; 64 weights share one."),
            (WEIGHTS * 4.25 / 8 / 1e9, "that is in GB; the answer is asked for in bytes."),
            (WEIGHTS * 2, "that is the model in 16 bits."),
        ),
        hints=(
            "how many bits does one weight take, its share of the scale included?",
            "4 + 16 / 64 bits a weight.",
        ),
    ),
    "00.fastest": Exercise(
        "Write fastest(weight_bytes, kv_bytes, bytes_per_second): the most tokens a second at which one "
        "sequence can be decoded if only memory limits it.",
        lambda weights, kv, bandwidth: bandwidth / (weights + kv),
        cases=((269e6, 0, 22e9), (16.06e9, 1.074e9, 1008e9), (4.27e9, 1.074e9, 89.6e9)),
        slips=(
            (lambda w, kv, b: (w + kv) / b, "that is seconds a token; asked for are tokens a second."),
            (lambda w, kv, b: b / w, "the cache is missing: each token reads all keys and values too."),
            (
                lambda w, kv, b: 1000 * (w + kv) / b,
                "that is milliseconds a token; asked for are tokens a second.",
            ),
        ),
        hints=(
            "for each token, every weight and the whole cache pass once through the processor.",
            "bytes a second divided by bytes a token.",
        ),
    ),
    "00.total_ms": Exercise(
        "Write total_ms(ttft_ms, tpot_ms, new): the time of a request with `new` tokens after the first.",
        lambda ttft, tpot, new: ttft + tpot * new,
        cases=((95.5, 33.1, 64), (320.0, 36.0, 1), (110.0, 37.0, 0)),
        slips=(
            (lambda t, p, n: t + p * (n - 1), "`new` tokens follow the first one, so none of them is free."),
            (lambda t, p, n: (t + p) * n, "the prompt is read only once."),
            (lambda t, p, n: t + p, "every one of the `new` tokens takes its time."),
        ),
        hints=("first the prompt, then token after token.", "TTFT + TPOT x new."),
    ),
}
