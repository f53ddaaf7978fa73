// The machine instructions the kernels are made of; knows nothing of codes or attention.
// No CUDA header is included: a pip-installed CuPy brings none, and NVRTC then still compiles these files.
#pragma once

// Variants of one source, chosen when it is compiled.
#ifndef PQ_BF16
#define PQ_BF16 0  // the model's dtype: 0 fp16, 1 bf16
#endif
#ifndef PQ_MASK
#define PQ_MASK 0  // attention mask: 0 none, 1 bool, 2 additive in the model's dtype
#endif
#ifndef PQ_SOFTCAP
#define PQ_SOFTCAP 0  // 1: scores pass through softcap * tanh(score / softcap)
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#ifdef PQ_EMULATOR
#include "emulator.h"
#else

#define PQ_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Picks 4 bytes out of the 8 of (b, a): how a code becomes a table address in one instruction.
__device__ __forceinline__ u32 pick_bytes(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

__device__ __forceinline__ u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
__device__ __forceinline__ u32 shift_pair_right(u32 low, u32 high, int bits) {
    return __funnelshift_r(low, high, bits);
}

// Not volatile: the compiler may move look-ups freely; the tables do not change between two barriers.
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ uint2 load_shared_pair(u32 address) {
    uint2 v;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

__device__ __forceinline__ uint4 load_shared_quad(u32 address) {
    uint4 v;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// BYTES (4, 8 or 16) from global into shared memory, for wait_copies() of the same thread to wait for; before the copy
// is asked for, what its target held must have been read.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 target, const void* source) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(source), "n"(BYTES) : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the LEFT latest groups are under way.
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// What a copy brought: read after it was waited for, before the next one to the same place is asked for.
__device__ __forceinline__ uint4 load_copied(u32 address, uint4) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_copied(u32 address, uint2) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ u32 load_copied(u32 address, u32) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// Codes are read once: they must not push the codebooks of other blocks out of L1. Volatile keeps the loads early.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 load_stream(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 load_stream(const u32* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 load_stream(const u16* p) {
    u16 v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

// An ordinary load, told that its address is in global memory. Not __ldg: that may move above wait_for_earlier().
template <class T>
__device__ __forceinline__ u32 load_global(const T* p) {
    __builtin_assume(__isGlobal(p));
    return *p;
}

__device__ __forceinline__ uint4 load_global_quad(const uint4* p) {
    __builtin_assume(__isGlobal(p));
    return *p;
}

__device__ __forceinline__ u16 half_of(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

__device__ __forceinline__ float float_of_half(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

__device__ __forceinline__ u16 bfloat_of(float x) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

// Two floats as a pair of fp16 values, `low` in the low half.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// The same by another instruction: the compiler keeps the two results in two registers, where it would copy one for
// every use of both.
__device__ __forceinline__ u32 multiply_halves_again(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}

// The 8 x 8 numbers of 16 bits that a warp holds, lane 4 g + c numbers 2 c and 2 c + 1 of row g, turned over: columns
// for rows.
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

// The largest of the warp's numbers, in every lane.
__device__ __forceinline__ int warp_max(int x) {
    int d;
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(x));
    return d;
}

// Hides where a value comes from, so that the compiler keeps it in a register instead of recomputing it.
__device__ __forceinline__ void opaque(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(const u8*& x) { asm volatile("" : "+l"(x)); }

// Read anew each time: the compiler must not keep what is made of them in registers from one use to the next.
__device__ __forceinline__ int thread_number() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
__device__ __forceinline__ int block_number_y() {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(x));
    return x;
}
__device__ __forceinline__ int load_fresh(const int* p) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

// Loads stay on their side of this: with all of them in flight at once the registers would not do.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// c += a b with a (16, 16) and b (16, 8) fp16, c (16, 8) float; the standard fragments of mma.m16n8k16.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b with a (16, 32) and b (32, 8), where of every 4 neighbours in a row of a two are not zero: numbers 0 and 2
// in rows 0 to 7, 1 and 3 in rows 8 to 15. 9 clocks, where the two multiplications that it replaces take 15.
__device__ __forceinline__ void multiply_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4]) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define PQ_MMA_SPARSE "mma.sp::ordered_metadata"
#else
#define PQ_MMA_SPARSE "mma.sp"
#endif
    asm(PQ_MMA_SPARSE
        ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
        "{%0, %1, %2, %3}, %12, 0x0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(0xdddd8888u));
}

// As multiply, with a and b in bf16.
__device__ __forceinline__ void multiply_bfloats(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Stored for, and read by, other blocks of the same launch: past L1, which is not coherent.
__device__ __forceinline__ void store_shared_level(float4* p, float4 v) { __stcg(p, v); }
__device__ __forceinline__ void store_shared_level(float2* p, float2 v) { __stcg(p, v); }
__device__ __forceinline__ void store_shared_level(float* p, float v) { __stcg(p, v); }
__device__ __forceinline__ float4 load_shared_level(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ float2 load_shared_level(const float2* p) { return __ldcg(p); }
__device__ __forceinline__ float load_shared_level(const float* p) { return __ldcg(p); }
__device__ __forceinline__ int load_shared_level(const int* p) { return __ldcg(p); }

// Adds one with release and acquire: what this block wrote before is seen by whoever reads the count after it. Lighter
// than two __threadfence() around a relaxed one.
__device__ __forceinline__ int take_ticket(int* p) {
    int x;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A kernel may start while the one before it in the stream still runs: let_next_start() allows it to the next one, and
// nothing that earlier kernels write may be touched before wait_for_earlier().
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ void let_next_start() {}
__device__ __forceinline__ void wait_for_earlier() {}
#endif

// A barrier in shared memory, used once: threads arrive, and wait later.
__device__ __forceinline__ void barrier_init(u32 barrier, int threads) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barrier)
                     : "memory");
    } while (!done);
    __syncwarp();
}

// Asks for `bytes` (a multiple of 16) into L2.
__device__ __forceinline__ void prefetch_bulk(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#endif  // PQ_EMULATOR

// A model tensor's element: fp16, or bf16 where the model runs in it.
#if PQ_BF16
__device__ __forceinline__ float float_of(u16 x) { return __int_as_float((int)((u32)x << 16)); }
__device__ __forceinline__ u16 element_of(float x) { return bfloat_of(x); }
__device__ __forceinline__ void multiply_elements(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_bfloats(c, a, b0, b1);
}
#else
__device__ __forceinline__ float float_of(u16 x) { return float_of_half(x); }
__device__ __forceinline__ u16 element_of(float x) { return half_of(x); }
__device__ __forceinline__ void multiply_elements(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply(c, a, b0, b1);
}
#endif

// Two neighbouring elements as fp16. bf16 has fewer digits than fp16, so only its range is cut: at 65504.
__device__ __forceinline__ u32 halves_of(u32 pair) {
#if PQ_BF16
    const float low = __int_as_float((int)(pair << 16)), high = __int_as_float((int)(pair & 0xffff0000u));
    return pack_halves(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
#else
    return pair;
#endif
}
