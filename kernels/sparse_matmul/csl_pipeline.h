// What v3 and later rungs share: two buffers, the next tile under way while tensor cores multiply this one.

const int COLUMNS = 64;
#include "tile.h"

const int TILE = ROWS * COLUMNS;
const int AHEAD = VECTORS;  // loads of four words that a thread has under way; what a tile has beyond is read late

DEVICE void unpack(u16* tile, const Words& w) {
  for (int i = 0; i < 4; i++) tile[w.at[i] >> 16] = (u16)w.at[i];
}

// a thread's share of the words from `begin` to `end`, as many as it can hold
DEVICE void fetch_words(Words (&ahead)[AHEAD], const Words* words, int begin, int end) {
  for (int i = 0; i < AHEAD; i++) {
    const int v = begin + threadIdx.x + i * THREADS;
    if (v < end) ahead[i] = load_once(words + v);
  }
}
DEVICE void unpack_words(u16* tile, const Words (&ahead)[AHEAD], const Words* words, int begin, int end) {
  for (int i = 0; i < AHEAD; i++)
    if (begin + threadIdx.x + i * THREADS < end) unpack(tile, ahead[i]);
  for (int v = begin + threadIdx.x + AHEAD * THREADS; v < end; v += THREADS) unpack(tile, load_once(words + v));
}

DEVICE void clear(u16* tile, const void* anywhere) {
  for (int i = threadIdx.x; i < TILE / 8; i += THREADS) copy_16(tile + i * 8, anywhere, 0);
  commit_copies();
}

// sums += the tiles from step `from` to step `to` times the inputs first, first + 1, ...; bounds: of a row of tiles
DEVICE void accumulate(float (&sums)[2][BN / 8][4], const Words* words, const int* bounds, const u16* x, int first,
                       int from, int to, int N, int K) {
  u16* tiles = (u16*)shared_memory;  // two of (128, 64)
  u16* inputs = tiles + 2 * TILE;    // two of (BN, 64)
  Words ahead[AHEAD];
  int begin = bounds[from], end = bounds[from + 1];
  fetch_words(ahead, words, begin, end);
  clear(tiles + from % 2 * TILE, x);
  fetch_inputs(inputs + from % 2 * INPUTS, x, first, from, N, K);
  commit_copies();
  wait_for_copies<1>();
  __syncthreads();

  for (int step = from; step < to; step++) {
    u16 *tile = tiles + step % 2 * TILE, *input = inputs + step % 2 * INPUTS;
    unpack_words(tile, ahead, words, begin, end);
    wait_for_copies<0>();
    __syncthreads();  // the tile and its inputs are whole
    if (step + 1 < to) {
      begin = end;
      end = bounds[step + 2];
      fetch_words(ahead, words, begin, end);
      clear(tiles + (step + 1) % 2 * TILE, x);
      fetch_inputs(inputs + (step + 1) % 2 * INPUTS, x, first, step + 1, N, K);
      commit_copies();
    }
    multiply(sums, tile, input);
    wait_for_copies<1>();
    __syncthreads();  // the next tile's place is clear, and nobody reads this one any more
  }
}
