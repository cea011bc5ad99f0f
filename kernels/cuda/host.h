// The functions of device.h on a CPU: a thread is a thread, a warp meets at a barrier, an asynchronous copy
// happens only when it is waited for. Shared memory starts as 0xFF, so that what nobody wrote shows.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <tuple>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define KERNEL(threads) void
#define __restrict__

struct alignas(16) Words {
  u32 at[4];
};
struct Index {
  int x, y, z;
};

inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;
alignas(256) inline unsigned char shared_memory[232448];

struct Barrier {
  pthread_barrier_t barrier;
  explicit Barrier(int n) { pthread_barrier_init(&barrier, nullptr, n); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
};
struct Warp {
  Barrier barrier{32};
  u32 rows[32];
  u32 a[32][4], b[32][2];
};
inline Barrier* block_barrier;
inline std::vector<Warp>* warps;

inline void __syncthreads() { block_barrier->wait(); }
inline Warp& warp() { return (*warps)[threadIdx.x / 32]; }

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
inline thread_local std::vector<std::vector<Copy>> copies;

DEVICE void copy_16(void* to, const void* from, int bytes) {
  assert((uintptr_t)to % 16 == 0 && (bytes == 0 || (uintptr_t)from % 16 == 0));
  copies.back().push_back({to, from, bytes});
}
DEVICE void commit_copies() { copies.emplace_back(); }
template <int pending>
DEVICE void wait_for_copies() {
  while ((int)copies.size() - 1 > pending) {
    for (const Copy& c : copies.front())  // byte by byte: ThreadSanitizer does not see a memset of known size
      for (int i = 0; i < 16; i++) ((u8*)c.to)[i] = i < c.bytes ? ((const u8*)c.from)[i] : 0;
    copies.erase(copies.begin());
  }
}

DEVICE Words load_once(const Words* p) {
  assert((uintptr_t)p % 16 == 0);
  return *p;
}

// an address in shared memory is a number of bytes
DEVICE u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - shared_memory); }
DEVICE u32 take_if(u32 bit, u32& at) {
  if (!bit) return 0;
  at += 2;
  return *(const u16*)(shared_memory + at - 2);
}
DEVICE u32 pair_of(u32 low, u32 high) { return low | high << 16; }

template <int matrices>
DEVICE void load_matrices(u32 (&to)[matrices], u32 row) {
  Warp& w = warp();
  const int lane = threadIdx.x % 32;
  assert(lane >= 8 * matrices || row % 16 == 0);
  w.rows[lane] = row;
  w.barrier.wait();
  for (int i = 0; i < matrices; i++) to[i] = *(const u32*)(shared_memory + w.rows[8 * i + lane / 4] + lane % 4 * 4);
  w.barrier.wait();
}

DEVICE float to_float(u16 h) {
#ifdef BF16
  return std::bit_cast<float>((u32)h << 16);
#else
  return (float)std::bit_cast<_Float16>(h);
#endif
}
DEVICE u16 to_half(float v) {
#ifdef BF16
  u32 u = std::bit_cast<u32>(v);
  return std::isnan(v) ? 0x7FFF : (u16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
#else
  return std::bit_cast<u16>((_Float16)v);
#endif
}

DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  Warp& w = warp();
  const int lane = threadIdx.x % 32;
  std::copy(a, a + 4, w.a[lane]);
  std::copy(b, b + 2, w.b[lane]);
  w.barrier.wait();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const u32 left = w.a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
      const u32 right = w.b[column * 4 + k % 8 / 2][k / 8];
      sum += to_float((u16)(left >> k % 2 * 16)) * to_float((u16)(right >> k % 2 * 16));
    }
    c[i] += sum;
  }
  w.barrier.wait();
}

DEVICE int ones(u32 v) { return std::popcount(v); }
DEVICE int from_below(int v, int lanes) {
  Warp& w = warp();
  const int lane = threadIdx.x % 32;
  w.b[lane][0] = v;
  w.barrier.wait();
  const int found = w.b[lane < lanes ? lane : lane - lanes][0];
  w.barrier.wait();
  return found;
}

DEVICE int count_up(int* counter) { return std::atomic_ref<int>(*counter).fetch_add(1); }
DEVICE void fence() {
  static std::atomic<int> all;
  all.fetch_add(0);  // ThreadSanitizer knows this one, and no fence
}

// Run all blocks of `kernel`, one after the other; args[i] points to the i-th argument, as the driver has it.
// The number of blocks that wrote to shared memory beyond `shared_bytes`.
template <class... Args>
int run_grid(void (*kernel)(Args...), Index grid, int threads, int shared_bytes, void** args) {
  int astray = 0;
  gridDim = grid;
  std::vector<Warp> warps_of_block((threads + 31) / 32);
  warps = &warps_of_block;
  Barrier all(threads);
  block_barrier = &all;
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        std::memset(shared_memory, 0xFF, sizeof shared_memory);
        std::vector<std::thread> running;
        for (int t = 0; t < threads; t++)
          running.emplace_back([=] {
            threadIdx = {t, 0, 0};
            copies.assign(1, {});
            [&]<size_t... i>(std::index_sequence<i...>) {
              kernel(*(std::remove_reference_t<Args>*)args[i]...);
            }(std::index_sequence_for<Args...>());
          });
        for (std::thread& t : running) t.join();
        astray += std::any_of(shared_memory + shared_bytes, std::end(shared_memory), [](auto b) { return b != 0xFF; });
      }
  return astray;
}
