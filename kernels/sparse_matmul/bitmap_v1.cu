// v1: decode straight into the registers that tensor cores read. A lane walks through its 32 bits; where a bit
// is set, the next of its values goes into the register. See bitmap.py for the layout.

#include "tile.h"

const int VALUES = CAPACITY + 8;                                    // of a tile; a lane may look one beyond
const int STAGE = (STRIPS * 32 * 4 + VALUES * 2 + INPUTS * 2 + 127) / 128 * 128;  // bytes

struct Stage {
  u32* masks;
  u16 *values, *inputs;
};
DEVICE Stage stage(int i) {
  unsigned char* at = shared_memory + i % STAGES * STAGE;
  return {(u32*)at, (u16*)(at + STRIPS * 32 * 4 + INPUTS * 2), (u16*)(at + STRIPS * 32 * 4)};
}

// all that a step needs sets out for shared memory
DEVICE void fetch(Stage to, const u32* masks, const u16* values, int begin, int end, const u16* x, int step, int N,
                  int K) {
  const int thread = threadIdx.x;
  for (int i = thread; i < STRIPS * 32 / 4; i += THREADS) copy_16(to.masks + i * 4, masks + i * 4, 16);
  for (int i = begin / 8 + thread; i < (end + 7) / 8; i += THREADS)
    copy_16(to.values + (i - begin / 8) * 8, values + (u64)i * 8, 16);
  fetch_inputs(to.inputs, x, blockIdx.y * BN, step, N, K);  // and commits
}

// where this lane's values begin among those of its strip
DEVICE int before(u32 mask) {
  const int mine = ones(mask), lane = threadIdx.x % 32;
  int sum = mine;
  for (int d = 1; d < 32; d *= 2) {
    const int below = from_below(sum, d);
    if (lane >= d) sum += below;
  }
  return sum - mine;
}

// eight weights, those of 16 columns, into four registers of two; `next` walks on over the values
DEVICE void decode(u32 (&to)[4], u32 bits, const u16*& next) {
  for (int r = 0; r < 4; r++) {
    const u32 low = bits >> 2 * r & 1, high = bits >> (2 * r + 1) & 1;
    const u32 first = next[0], second = next[low];
    to[r] = (low ? first : 0) | (high ? second : 0) << 16;
    next += low + high;
  }
}

KERNEL(THREADS)
bitmap_v1(const u32* masks, const u16* values, const int* starts, const u16* x, u16* y, float* partial,
          int* finished, int M, int N, int K) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = (K + COLUMNS - 1) / COLUMNS, splits = gridDim.z;
  const int from = steps * blockIdx.z / splits, to = steps * (blockIdx.z + 1) / splits;
  float sums[2][BN / 8][4] = {};
  masks += (u64)blockIdx.x * steps * STRIPS * 32;
  starts += blockIdx.x * steps * STRIPS;

  auto set_out = [&](int step) {
    if (step < to)
      fetch(stage(step), masks + (u64)step * STRIPS * 32, values, starts[step * STRIPS], starts[(step + 1) * STRIPS],
            x, step, N, K);
    else
      commit_copies();
  };
  for (int step = from; step < from + STAGES - 1; step++) set_out(step);
  for (int step = from; step < to; step++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this step has come, and nobody reads the one before any more
    set_out(step + STAGES - 1);
    const Stage now = stage(step);
    u32 bits[2];
    const u16* next[2];
    for (int m = 0; m < 2; m++) {
      const int strip = warp * 2 + m;
      bits[m] = now.masks[strip * 32 + lane];
      next[m] = now.values + starts[step * STRIPS + strip] - starts[step * STRIPS] + before(bits[m]);
    }
    for (int k = 0; k < COLUMNS / 16; k++) {
      u32 weights[2][4], pair[2];
      for (int m = 0; m < 2; m++) decode(weights[m], bits[m] >> 8 * k, next[m]);
      for (int n = 0; n < BN / 8; n++) {
        load_matrices(pair, chunk(now.inputs, n * 8 + lane % 8, k * 2 + lane / 8 % 2));
        for (int m = 0; m < 2; m++) multiply_add(sums[m][n], weights[m], pair);
      }
    }
  }
  __syncthreads();
  store(sums, y, partial, finished, M, N);
}
