// Decoded straight into the registers that tensor cores read: a lane walks through its bits, and where one is set,
// the next of its values goes into the register. Tiles travel to shared memory as they lie in memory, STAGES of
// them at once. See bitmap.py for the layout.

const int COLUMNS = 128;
#include "tile.h"

const int MASKS = STRIPS * 2 * 32, HEAD = MASKS * 4 + STRIPS * 2;  // words; bytes before the values
const int STAGE = CAPACITY * 16 + INPUTS * 2;                      // bytes

// where this lane's values begin in two strips, 16 bits each: the popcounts of the lanes below
DEVICE u32 begins(u32 counts) {
  const int lane = threadIdx.x % 32;
  u32 sum = counts;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u32 below = from_below(sum, d);
    if (lane >= d) sum += below;
  }
  return sum - counts;
}

// eight weights, those of 16 columns, into four registers of two; `next` walks on over the values
DEVICE void decode(u32 (&to)[4], u32 bits, u32& next) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const u32 low = take_if(bits & 1 << 2 * r, next), high = take_if(bits & 2 << 2 * r, next);
    to[r] = pair_of(low, high);
  }
}

KERNEL(THREADS)
bitmap(const u16* words, const int* offsets, const u16* x, u16* y, float* partial, int* finished, int M, int N,
       int K) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int steps = (K + COLUMNS - 1) / COLUMNS, splits = gridDim.z;
  const int from = steps * blockIdx.z / splits, to = steps * (blockIdx.z + 1) / splits;
  float sums[2][BN / 8][4] = {};
  offsets += blockIdx.x * steps;

  auto set_out = [&](int step) {
    if (step < to) {
      unsigned char* stage = shared_memory + step % STAGES * STAGE;
      const int begin = offsets[step], count = offsets[step + 1] - begin;
      const u16* tile = words + (u64)begin * 8;
      for (int i = thread; i < count; i += THREADS) copy_16(stage + i * 16, tile + i * 8, 16);
      fetch_inputs((u16*)(stage + CAPACITY * 16), x, blockIdx.y * BN, step, N, K);
    }
    commit_copies();
  };
  for (int step = from; step < from + STAGES - 1; step++) set_out(step);
  for (int step = from; step < to; step++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this step has come, and nobody reads the one before any more
    set_out(step + STAGES - 1);

    const unsigned char* stage = shared_memory + step % STAGES * STAGE;
    const u32* masks = (const u32*)stage + warp * 2 * 64 + lane;  // of this warp's two strips
    const u16* starts = (const u16*)(stage + MASKS * 4) + warp * 2;
    u16* inputs = (u16*)(stage + CAPACITY * 16);
    u32 bits[2][2];
    for (int m = 0; m < 2; m++)
      for (int half = 0; half < 2; half++) bits[m][half] = masks[m * 64 + half * 32];
    const u32 upper = ones(bits[0][0]) + ones(bits[0][1]), lower = ones(bits[1][0]) + ones(bits[1][1]);
    const u32 begin = begins(upper | lower << 16);
    const u32 values = shared_address(stage + HEAD);
    u32 next[2] = {values + 2 * (starts[0] + (begin & 0xFFFF)), values + 2 * (starts[1] + (begin >> 16))};
    const u32 input = shared_address(chunk(inputs, lane % 8, lane / 8 % 2));
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
      u32 weights[2][4], pair[2];
      for (int m = 0; m < 2; m++) decode(weights[m], bits[m][k / 4] >> k % 4 * 8, next[m]);
#pragma unroll
      for (int n = 0; n < BN / 8; n++) {
        load_matrices(pair, along(input, k * 2) + n * 8 * COLUMNS * 2);
        for (int m = 0; m < 2; m++) multiply_add(sums[m][n], weights[m], pair);
      }
    }
  }
  store(sums, y, partial, finished, M, N);
}
