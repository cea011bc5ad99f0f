// What v3 and later rungs share: two buffers, the next tile under way while tensor cores multiply this one.

const int COLUMNS = 64;
#include "tile.h"

const int TILE = ROWS * COLUMNS;
const int AHEAD = VECTORS;  // loads of four words that a thread has under way; what a tile has beyond is read late

DEVICE void unpack(u16* tile, const Words& w) {
  for (int i = 0; i < 4; i++) tile[w.at[i] >> 16] = (u16)w.at[i];
}

// a thread's share of the `count` loads that make up a tile's words, as many as it can hold
DEVICE void fetch_words(Words (&ahead)[AHEAD], const Words* words, int count) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i * THREADS + (int)threadIdx.x < count) ahead[i] = load_once(words + threadIdx.x + i * THREADS);
}
DEVICE void unpack_words(u16* tile, const Words (&ahead)[AHEAD], const Words* words, int count) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i * THREADS + (int)threadIdx.x < count) unpack(tile, ahead[i]);
#pragma unroll 1
  for (int v = AHEAD * THREADS + threadIdx.x; v < count; v += THREADS) unpack(tile, load_once(words + v));
}

DEVICE void clear(u16* tile) {
#pragma unroll
  for (int i = 0; i < TILE / 8 / THREADS; i++) ((Words*)tile)[i * THREADS + threadIdx.x] = Words{{0, 0, 0, 0}};
}

// sums += the tiles from step `from` to step `to` times the inputs first, first + 1, ...; bounds: of a row of tiles
DEVICE void accumulate(float (&sums)[2][BN / 8][4], const Words* words, const int* bounds, const u16* x, int first,
                       int from, int to, int N, int K) {
  u16* tiles = (u16*)shared_memory;  // two of (128, 64)
  u16* inputs = tiles + 2 * TILE;    // two of (BN, 64)
  Words ahead[AHEAD];
  const Words* next = words + bounds[from];
  int count = bounds[from + 1] - bounds[from];
  fetch_words(ahead, next, count);
  clear(tiles + from % 2 * TILE);
  fetch_inputs(inputs + from % 2 * INPUTS, x, first, from, N, K);
  commit_copies();
  __syncthreads();

  for (int step = from; step < to; step++) {
    u16 *tile = tiles + step % 2 * TILE, *input = inputs + step % 2 * INPUTS;
    unpack_words(tile, ahead, next, count);
    wait_for_copies<0>();
    __syncthreads();  // the tile and its inputs are whole
    if (step + 1 < to) {
      next += count;
      count = bounds[step + 2] - bounds[step + 1];
      fetch_words(ahead, next, count);
      clear(tiles + (step + 1) % 2 * TILE);
      fetch_inputs(inputs + (step + 1) % 2 * INPUTS, x, first, step + 1, N, K);
      commit_copies();
    }
    multiply(sums, tile, input);
    __syncthreads();  // the next tile's place is clear, and nobody reads this one any more
  }
}
