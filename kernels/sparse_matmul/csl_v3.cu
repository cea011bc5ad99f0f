// v3: two buffers. While tensor cores multiply one tile, the packed words of the next one travel to registers,
// its inputs to shared memory, and the place where it will be unpacked is cleared.

#include "csl_pipeline.h"

KERNEL(THREADS)
csl_v3(const Words* words, const int* offsets, const u16* x, u16* y, int M, int N, int K) {
  const int steps = (K + COLUMNS - 1) / COLUMNS;
  float sums[2][BN / 8][4] = {};
  accumulate<Quads>(sums, words, offsets + blockIdx.x * steps, x, blockIdx.y * BN, 0, steps, N, K);
  for_each_output(sums, M, N, [&](int row, int token, float& sum) { y[(u64)token * M + row] = to_half(sum); });
}
