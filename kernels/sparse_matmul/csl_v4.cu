// v4: split K. A narrow layer has few rows of tiles, fewer than a GPU has multiprocessors; so several blocks share
// a row of tiles, each taking some of its columns. The last one to finish adds up what all have found.

#include "csl_pipeline.h"

KERNEL(THREADS)
csl_v4(const Words* words, const int* offsets, const u16* x, u16* y, float* partial, int* finished, int M, int N,
       int K) {
  const int steps = (K + COLUMNS - 1) / COLUMNS, splits = gridDim.z;
  const int from = steps * blockIdx.z / splits, to = steps * (blockIdx.z + 1) / splits;
  float sums[2][BN / 8][4] = {};
  accumulate<Quads>(sums, words, offsets + blockIdx.x * steps, x, blockIdx.y * BN, from, to, N, K);
  store(sums, y, partial, finished, M, N);
}
