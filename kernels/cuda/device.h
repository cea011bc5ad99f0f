// What the kernels take from the GPU, as functions: halves are 16-bit integers, so no CUDA header is needed.
// host.h gives the same functions to a CPU, so that a kernel can be run, and its races found, without a GPU.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

struct alignas(16) Words {  // what one 128-bit load brings
  u32 at[4];
};

extern __shared__ __align__(256) unsigned char shared_memory[];

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, without a register in between; the bytes after `bytes` become 0
DEVICE void copy_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int pending>
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(pending)); }

// 128 bits that are read once: past the first cache
DEVICE Words load_once(const Words* p) {
  Words w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3]) : "l"(p));
  return w;
}

// the half at `at` in shared memory if `bit` is set, and a step to the next one; else 0
DEVICE u32 take_if(u32 bit, u32& at) {
  u32 half;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.shared.u16 %0, [%1]; @p add.u32 %1, %1, 2;}"
               : "=&r"(half), "+r"(at) : "r"(bit));
  return half;
}
DEVICE u32 pair_of(u32 low, u32 high) { return __byte_perm(low, high, 0x5410); }

// four 8 x 8 matrices of halves; lane 8 i + r gives the address in shared memory of row r of matrix i
DEVICE void load_matrices(u32 (&to)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}
DEVICE void load_matrices(u32 (&to)[2], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(to[0]), "=r"(to[1]) : "r"(row));
}

// c (16 x 8, float) += a (16 x 16) b (16 x 8), on tensor cores
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u16 to_half(float v) {
  u16 h;
#ifdef BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#endif
  return h;
}
DEVICE float to_float(u16 h) {
#ifdef BF16
  return __uint_as_float((u32)h << 16);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
  return v;
#endif
}

DEVICE int ones(u32 v) { return __popc(v); }
// the value of the lane that lies `lanes` below; the lowest lanes keep their own
DEVICE int from_below(int v, int lanes) { return __shfl_up_sync(0xFFFFFFFF, v, lanes); }

DEVICE int count_up(int* counter) { return atomicAdd(counter, 1); }
DEVICE void fence() { __threadfence(); }
