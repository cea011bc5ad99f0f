// v5: fewer bytes. Eight values lie in one window of 256 slots, so a value takes 3.125 bytes instead of 4; see
// compact.py. A thread fetches a group of eight with three loads: of 16 bytes, of 8 and of 1.

#include "csl_pipeline.h"

struct alignas(8) Places {  // of eight values, a byte each
  u32 at[2];
};
struct Group {
  Words values;
  Places places;
  u32 window;
};

// two places are worked out at once, each in half a word; in bytes they stay below 65536
DEVICE void unpack(u16* tile, const Group& group) {
  const u32 window = group.window * 0x00400040;
  for (int i = 0; i < 2; i++) {
    const u32 places = group.places.at[i];
    const u32 even = ((places & 0x00FF00FF) << 1) + window, odd = ((places & 0xFF00FF00) >> 7) + window;
    const u32 at[4] = {even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16};
    for (int j = 0; j < 4; j++)
      *(u16*)((unsigned char*)tile + at[j]) = (u16)(group.values.at[i * 2 + j / 2] >> j % 2 * 16);
  }
}

// a tile is 16 bytes of values for each group, then 8 of places, then one of a window
struct Groups {
  typedef Group Load;
  const Words* values;
  const Places* places;
  const unsigned char* windows;
  int count;
  DEVICE Groups(const Words* words, const int* bounds) {
    const int groups = (bounds[1] - bounds[0]) * 16 / 25, thread = threadIdx.x;
    values = words + bounds[0] + thread;
    places = (const Places*)(words + bounds[0] + groups) + thread;
    windows = (const unsigned char*)((const Places*)(words + bounds[0] + groups) + groups) + thread;
    count = groups - thread;
  }
  DEVICE Group load(int i) const { return {load_once(values + i), places[i], windows[i]}; }
};

KERNEL(THREADS)
csl_v5(const Words* __restrict__ words, const int* __restrict__ offsets, const u16* __restrict__ x, u16* y,
       float* partial, int* finished, int M, int N, int K) {
  const int steps = (K + COLUMNS - 1) / COLUMNS, splits = gridDim.z;
  const int from = steps * blockIdx.z / splits, to = steps * (blockIdx.z + 1) / splits;
  float sums[2][BN / 8][4] = {};
  accumulate<Groups>(sums, words, offsets + blockIdx.x * steps, x, blockIdx.y * BN, from, to, N, K);
  store(sums, y, partial, finished, M, N);
}
