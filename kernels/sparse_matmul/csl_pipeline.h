// What v3 and later rungs share: two buffers, the next tile under way while tensor cores multiply this one.

const int COLUMNS = 64;
#include "tile.h"

const int TILE = ROWS * COLUMNS;
const int AHEAD = VECTORS;  // loads that a thread has under way; what a tile has beyond is read late

DEVICE void clear(u16* tile) {
#pragma unroll
  for (int i = 0; i < TILE / 8 / THREADS; i++) ((Words*)tile)[i * THREADS + threadIdx.x] = Words{{0, 0, 0, 0}};
}

// A thread's share of a tile. Share(words, bounds) is that between two offsets; it has `count` loads 0, THREADS,
// ... of what load(i) brings, and unpack(tile, loaded) puts that in its place.
template <class Share>
DEVICE void fetch(typename Share::Load (&ahead)[AHEAD], const Share& share) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i * THREADS < share.count) ahead[i] = share.load(i * THREADS);
}
template <class Share>
DEVICE void unpack_all(u16* tile, const typename Share::Load (&ahead)[AHEAD], const Share& share) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i * THREADS < share.count) unpack(tile, ahead[i]);
#pragma unroll 1
  for (int i = AHEAD * THREADS; i < share.count; i += THREADS) unpack(tile, share.load(i));
}

// sums += the tiles from step `from` to step `to` times the inputs first, first + 1, ...; bounds: of a row of tiles
template <class Share>
DEVICE void accumulate(float (&sums)[2][BN / 8][4], const Words* words, const int* bounds, const u16* x, int first,
                       int from, int to, int N, int K) {
  u16* tiles = (u16*)shared_memory;  // two of (128, 64)
  u16* inputs = tiles + 2 * TILE;    // two of (BN, 64)
  typename Share::Load ahead[AHEAD];
  Share next(words, bounds + from);
  fetch(ahead, next);
  clear(tiles + from % 2 * TILE);
  fetch_inputs(inputs + from % 2 * INPUTS, x, first, from, N, K);
  commit_copies();
  __syncthreads();

  for (int step = from; step < to; step++) {
    u16 *tile = tiles + step % 2 * TILE, *input = inputs + step % 2 * INPUTS;
    unpack_all(tile, ahead, next);
    wait_for_copies<0>();
    __syncthreads();  // the tile and its inputs are whole
    if (step + 1 < to) {
      next = Share(words, bounds + step + 1);
      fetch(ahead, next);
      clear(tiles + (step + 1) % 2 * TILE);
      fetch_inputs(inputs + (step + 1) % 2 * INPUTS, x, first, step + 1, N, K);
      commit_copies();
    }
    multiply(sums, tile, input);
    __syncthreads();  // the next tile's place is clear, and nobody reads this one any more
  }
}

// four words: each a value, and where in the tile it lies, in bytes
DEVICE void unpack(u16* tile, const Words& w) {
  for (int i = 0; i < 4; i++) *(u16*)((unsigned char*)tile + (w.at[i] >> 16)) = (u16)w.at[i];
}
struct Quads {
  typedef Words Load;
  const Words* words;
  int count;
  DEVICE Quads(const Words* all, const int* bounds)
      : words(all + bounds[0] + threadIdx.x), count(bounds[1] - bounds[0] - (int)threadIdx.x) {}
  DEVICE Words load(int i) const { return load_once(words + i); }
};
