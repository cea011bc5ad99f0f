// Tiles of the weight meet tiles of the inputs: what all tensor-core kernels share. COLUMNS is theirs to say.

const int ROWS = 128, THREADS = 128, STRIPS = ROWS / 16, INPUTS = BN * COLUMNS, CHUNKS = COLUMNS / 8;

// a chunk of eight halves in row r lies where r says, so that eight rows of one chunk lie in different banks
DEVICE u16* chunk(u16* tile, u32 r, u32 c) { return tile + r * COLUMNS + (c ^ r % 8) * 8; }
// from a chunk of an even number to the one `more` after it, an even number too: the row does not change
DEVICE u32 along(u32 address, u32 more) { return address ^ more * 16; }

// COLUMNS columns of BN inputs set out for shared memory; what lies outside is 0
DEVICE void fetch_inputs(u16* to, const u16* x, int first, int step, int N, int K) {
  const u32 row = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
  const int k = step * COLUMNS + c * 8;
#pragma unroll
  for (int i = 0; i < BN; i += THREADS / CHUNKS) {
    const int n = i + row;
    const bool inside = first + n < N && k < K;
    if (n < BN) copy_16(chunk(to, n, c), inside ? x + (u64)(first + n) * K + k : x, inside ? 16 : 0);
  }
}

// each of 4 warps multiplies 32 rows of a tile in shared memory by the inputs
DEVICE void multiply(float (&sums)[2][BN / 8][4], u16* tile, u16* inputs) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 upper = shared_address(chunk(tile, warp * 32 + lane % 16, lane / 16));
  const u32 input = shared_address(chunk(inputs, lane % 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < CHUNKS; k += 2) {
    u32 weights[2][4], values[2];
    for (int m = 0; m < 2; m++) load_matrices(weights[m], along(upper, k) + m * 16 * COLUMNS * 2);
#pragma unroll
    for (int n = 0; n < BN / 8; n++) {
      load_matrices(values, along(input, k) + n * 8 * COLUMNS * 2);
      for (int m = 0; m < 2; m++) multiply_add(sums[m][n], weights[m], values);
    }
  }
}

// do(row, token, sum) for every output that this thread holds: rows lane / 4 and that + 8 of each strip, tokens
// 2 (lane % 4) and that + 1 of each eight
template <class Do>
DEVICE void for_each_output(float (&sums)[2][BN / 8][4], int M, int N, Do with) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < BN / 8; n++)
      for (int i = 0; i < 4; i++) {
        const int row = blockIdx.x * ROWS + warp * 32 + m * 16 + lane / 4 + i / 2 * 8;
        const int token = blockIdx.y * BN + n * 8 + lane % 4 * 2 + i % 2;
        if (row < M && token < N) with(row, token, sums[m][n][i]);
      }
}

// whether this block is the last of `blocks` to come here; the counter is ready for the next launch then
DEVICE bool last_to_finish(int* counter, int blocks) {
  int* last = (int*)shared_memory;
  fence();  // what this thread has written can be read by others
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = count_up(counter) == blocks - 1;
    if (*last) *counter = 0;
  }
  __syncthreads();
  fence();
  return *last;
}

// y, from the sums of all blocks that share this block's outputs; they are added in float32, in one order
DEVICE void store(float (&sums)[2][BN / 8][4], u16* y, float* partial, int* finished, int M, int N) {
  const int splits = gridDim.z;
  if (splits == 1) {
    for_each_output(sums, M, N, [&](int row, int token, float& sum) { y[(u64)token * M + row] = to_half(sum); });
    return;
  }
  float* mine = partial + (u64)blockIdx.z * N * M;
  for_each_output(sums, M, N, [&](int row, int token, float& sum) { mine[(u64)token * M + row] = sum; });
  if (!last_to_finish(finished + blockIdx.y * gridDim.x + blockIdx.x, splits)) return;
  for_each_output(sums, M, N, [&](int row, int token, float&) {
    float sum = 0;
    for (int z = 0; z < splits; z++) sum += partial[((u64)z * N + token) * M + row];
    y[(u64)token * M + row] = to_half(sum);
  });
}
