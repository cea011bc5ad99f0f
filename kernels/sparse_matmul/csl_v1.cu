// v1: load as sparse, compute as dense. A tile of the weight is unpacked into shared memory, then multiplied
// by plain multiply-adds, a row a thread.
//
// y (N, M) = x (N, K) W^T; W (M, K) in tiles of 128 x 64, see csl.py. One block computes 128 rows of W for
// BN rows of x. Xia et al. 2023, arXiv:2309.10285.

const int ROWS = 128, COLUMNS = 64, THREADS = 128;

KERNEL(THREADS)
csl_v1(const Words* words, const int* offsets, const u16* x, u16* y, int M, int N, int K) {
  u16* tile = (u16*)shared_memory;      // (128, 64), its chunks of eight shuffled
  u16* inputs = tile + ROWS * COLUMNS;  // (BN, 64)
  const int thread = threadIdx.x, row = blockIdx.x * ROWS + thread, first = blockIdx.y * BN;
  const int steps = (K + COLUMNS - 1) / COLUMNS;
  float sums[BN] = {};

  for (int step = 0; step < steps; step++) {
    for (int i = thread; i < ROWS * COLUMNS / 2; i += THREADS) ((u32*)tile)[i] = 0;
    for (int i = thread; i < BN * COLUMNS; i += THREADS) {
      const int n = first + i / COLUMNS, k = step * COLUMNS + i % COLUMNS;
      inputs[i] = n < N && k < K ? x[(u64)n * K + k] : 0;
    }
    __syncthreads();
    const int t = blockIdx.x * steps + step;
    for (int v = offsets[t] + thread; v < offsets[t + 1]; v += THREADS) {
      const Words w = words[v];
      for (int i = 0; i < 4; i++) tile[w.at[i] >> 17] = (u16)w.at[i];
    }
    __syncthreads();
    for (int k = 0; k < COLUMNS; k++) {
      const float weight = to_float(tile[thread * COLUMNS + ((k / 8 ^ thread % 8) * 8 + k % 8)]);
      for (int n = 0; n < BN; n++) sums[n] += weight * to_float(inputs[n * COLUMNS + k]);
    }
    __syncthreads();
  }
  for (int n = 0; n < BN; n++)
    if (row < M && first + n < N) y[(u64)(first + n) * M + row] = to_half(sums[n]);
}
