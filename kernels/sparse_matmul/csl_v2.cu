// v2: tensor cores. Each of 4 warps multiplies 32 rows of the unpacked tile by BN inputs, 16 columns at a time.

const int COLUMNS = 64;
#include "tile.h"

KERNEL(THREADS)
csl_v2(const Words* words, const int* offsets, const u16* x, u16* y, int M, int N, int K) {
  u16* tile = (u16*)shared_memory;      // (128, 64)
  u16* inputs = tile + ROWS * COLUMNS;  // (BN, 64)
  const int thread = threadIdx.x, steps = (K + COLUMNS - 1) / COLUMNS;
  float sums[2][BN / 8][4] = {};

  for (int step = 0; step < steps; step++) {
    for (int i = thread; i < ROWS * COLUMNS / 8; i += THREADS) ((Words*)tile)[i] = Words{{0, 0, 0, 0}};
    fetch_inputs(inputs, x, blockIdx.y * BN, step, N, K);
    commit_copies();
    __syncthreads();
    const int t = blockIdx.x * steps + step;
    for (int v = offsets[t] + thread; v < offsets[t + 1]; v += THREADS) {
      const Words w = load_once(words + v);
      for (int i = 0; i < 4; i++) tile[w.at[i] >> 17] = (u16)w.at[i];
    }
    wait_for_copies<0>();
    __syncthreads();
    multiply(sums, tile, inputs);
    __syncthreads();
  }
  for_each_output(sums, M, N, [&](int row, int token, float& sum) { y[(u64)token * M + row] = to_half(sum); });
}
