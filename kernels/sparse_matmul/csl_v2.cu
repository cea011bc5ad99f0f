// v2: tensor cores. Each of 4 warps multiplies 32 rows of the unpacked tile by BN inputs, 16 columns at a time.

const int ROWS = 128, COLUMNS = 64, THREADS = 128;

// a chunk of eight halves in row r lies where r says, so that eight rows of one chunk lie in eight banks
DEVICE const u16* chunk(const u16* tile, int r, int c) { return tile + r * COLUMNS + (c ^ r % 8) * 8; }

KERNEL(THREADS)
csl_v2(const Words* words, const int* offsets, const u16* x, u16* y, int M, int N, int K) {
  u16* tile = (u16*)shared_memory;      // (128, 64)
  u16* inputs = tile + ROWS * COLUMNS;  // (BN, 64)
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first = blockIdx.y * BN;
  const int steps = (K + COLUMNS - 1) / COLUMNS;
  float sums[2][BN / 8][4] = {};

  for (int step = 0; step < steps; step++) {
    for (int i = thread; i < ROWS * COLUMNS / 8; i += THREADS) ((Words*)tile)[i] = Words{{0, 0, 0, 0}};
    for (int i = thread; i < BN * 8; i += THREADS) {
      const int n = i / 8, c = i % 8, k = step * COLUMNS + c * 8;
      const bool inside = first + n < N && k < K;
      copy_16((void*)chunk(inputs, n, c), inside ? x + (u64)(first + n) * K + k : x, inside ? 16 : 0);
    }
    commit_copies();
    __syncthreads();
    const int t = blockIdx.x * steps + step;
    for (int v = offsets[t] + thread; v < offsets[t + 1]; v += THREADS) {
      const Words w = load_once(words + v);
      for (int i = 0; i < 4; i++) tile[w.at[i] >> 16] = (u16)w.at[i];
    }
    wait_for_copies<0>();
    __syncthreads();
    for (int k = 0; k < COLUMNS / 16; k++) {
      u32 weights[2][4], values[2];
      for (int m = 0; m < 2; m++)
        load_matrices(weights[m], chunk(tile, warp * 32 + m * 16 + lane % 16, k * 2 + lane / 16));
      for (int n = 0; n < BN / 8; n++) {
        load_matrices(values, chunk(inputs, n * 8 + lane % 8, k * 2 + lane / 8 % 2));
        for (int m = 0; m < 2; m++) multiply_add(sums[m][n], weights[m], values);
      }
    }
    __syncthreads();
  }
  // lane holds rows lane / 4 and that + 8, inputs 2 (lane % 4) and that + 1
  for (int m = 0; m < 2; m++)
    for (int n = 0; n < BN / 8; n++)
      for (int i = 0; i < 4; i++) {
        const int row = blockIdx.x * ROWS + warp * 32 + m * 16 + lane / 4 + i / 2 * 8;
        const int input = first + n * 8 + lane % 4 * 2 + i % 2;
        if (row < M && input < N) y[(u64)input * M + row] = to_half(sums[m][n][i]);
      }
}
