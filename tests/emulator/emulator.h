// What the kernels use of a GPU, on a CPU: every CUDA thread is a fiber, warps and blocks meet at barriers, matrix
// fragments and byte permutations are computed by their definition. Settles index arithmetic; says nothing of speed,
// except that it counts bank conflicts of the table look-ups.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define PQ_DYNAMIC_SHARED(name) uint4* name = emulator::shared()

using std::max;
using std::min;
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
constexpr u32 WINDOW = 1024;  // where dynamic shared memory begins in the shared window, as on sm_90
constexpr size_t STACK = 256 << 10;

struct Gate {  // a barrier that can be used again
    int size = 0, arrived = 0;
    long generation = 0;
};
struct LookUp {
    u32 address, words;
};
struct Warp {
    Gate gate;
    u32 in[32][6], word[32];
    std::vector<LookUp> look_ups[32];
};
struct Copy {
    u32 target;
    const void* source;
    int bytes;
};
struct Fiber {
    std::vector<std::vector<Copy>> copies{1};  // groups under way, the last one not committed yet
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int index = 0;
    bool done = false;
    Gate* waits = nullptr;
    long generation = 0;
};
extern Fiber* now;
extern ucontext_t scheduler;
extern std::vector<Warp> warps;
extern Gate block_gate;
extern std::map<u32, Gate> barriers;
extern std::vector<uint4> memory;
struct Block {
    int x, y, z;
};
extern Block block, grid;
inline uint4* shared() { return memory.data(); }
inline Warp& warp() { return warps[now->index / 32]; }
inline int lane() { return now->index % 32; }
inline void meet(Gate& gate) {
    if (++gate.arrived == gate.size) {
        gate.arrived = 0, gate.generation++;
        return;
    }
    now->waits = &gate, now->generation = gate.generation;
    swapcontext(&now->context, &scheduler);
}
inline void meet_warp() { meet(warp().gate); }
template <class T>
T exchange(T mine, int from) {
    static_assert(sizeof(T) == 4, "words only");
    memcpy(&warp().word[lane()], &mine, 4);
    meet_warp();
    T r;
    memcpy(&r, &warp().word[from & 31], 4);
    meet_warp();
    return r;
}
template <class T>
T aligned(T address, int bytes) {
    if ((uint64_t)address % bytes) fprintf(stderr, "an access of %d bytes is not aligned\n", bytes), abort();
    return address;
}
inline void note_look_up(u32 address, u32 words) {
    aligned(address, 4 * words);
    warp().look_ups[lane()].push_back({address, words});
}
inline char* at(u32 address) { return (char*)memory.data() + address - WINDOW; }
}  // namespace emulator

struct ThreadIndex {
    struct {
        operator int() const { return emulator::now->index; }
    } x;
};
static ThreadIndex threadIdx;
#define blockIdx emulator::block
#define gridDim emulator::grid

inline void __syncthreads() { emulator::meet(emulator::block_gate); }
inline int __syncthreads_and(int yes) {
    static bool votes[1024];
    votes[emulator::now->index] = yes;
    __syncthreads();
    bool all = true;
    for (int i = 0; i < emulator::block_gate.size; i++) all &= votes[i];
    __syncthreads();
    return all;
}
inline void __syncwarp() { emulator::meet_warp(); }
inline void __trap() { abort(); }
inline int take_ticket(int* p) { return (*p)++; }
inline int atomicOr(int* p, int v) {
    const int old = *p;
    *p |= v;
    return old;
}
template <class T>
T __shfl_xor_sync(u32, T v, int mask) {
    return emulator::exchange(v, emulator::lane() ^ mask);
}
template <class T>
T __shfl_sync(u32, T v, int from) {
    return emulator::exchange(v, from);
}
inline u32 __ballot_sync(u32, int yes) {
    emulator::warp().word[emulator::lane()] = yes != 0;
    emulator::meet_warp();
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= emulator::warp().word[i] << i;
    emulator::meet_warp();
    return r;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __any_sync(u32 lanes, int yes) { return __ballot_sync(lanes, yes) != 0; }
inline float __int_as_float(int i) {
    float f;
    memcpy(&f, &i, 4);
    return f;
}

inline int __float_as_int(float f) {
    int i;
    memcpy(&i, &f, 4);
    return i;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline u32 pick_bytes(u32 a, u32 b, u32 selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) {
        const int n = selector >> (4 * i) & 15;
        u32 v = bytes >> (8 * (n & 7)) & 255;
        if (n & 8) v = v & 128 ? 255 : 0;
        d |= v << (8 * i);
    }
    return d;
}
inline u32 shift_pair_right(u32 low, u32 high, int bits) { return (u32)(((uint64_t)high << 32 | low) >> bits); }
inline u32 load_shared(u32 address) {
    emulator::note_look_up(address, 1);
    u32 v;
    memcpy(&v, emulator::at(address), 4);
    return v;
}
inline uint2 load_shared_pair(u32 address) {
    emulator::note_look_up(address, 2);
    uint2 v;
    memcpy(&v, emulator::at(address), 8);
    return v;
}
inline uint4 load_shared_quad(u32 address) {
    emulator::note_look_up(address, 4);
    uint4 v;
    memcpy(&v, emulator::at(address), 16);
    return v;
}
// A copy happens as late as it may: when it is waited for.
template <int BYTES>
void copy_async(u32 target, const void* source) {
    emulator::now->copies.back().push_back({emulator::aligned(target, BYTES), emulator::aligned(source, BYTES), BYTES});
}
template <class T>
T load_copied(u32 address, T) {
    T v;
    memcpy(&v, emulator::at(emulator::aligned(address, sizeof v)), sizeof v);
    return v;
}
inline void commit_copies() { emulator::now->copies.emplace_back(); }
template <int LEFT>
void wait_copies() {
    auto& copies = emulator::now->copies;
    while (copies.size() > LEFT + 1) {
        for (const auto& copy : copies.front()) memcpy(emulator::at(copy.target), copy.source, copy.bytes);
        copies.erase(copies.begin());
    }
}
inline uint4 load_stream(const uint4* p) { return *emulator::aligned(p, 16); }
inline uint2 load_stream(const uint2* p) { return *emulator::aligned(p, 8); }
template <class T>
u32 load_stream(const T* p) {
    return *emulator::aligned(p, sizeof(T));
}
template <class T>
u32 load_global(const T* p) {
    return *emulator::aligned(p, sizeof(T));
}
inline uint4 load_global_quad(const uint4* p) { return *emulator::aligned(p, 16); }
inline u32 high_product(u32 a, u32 b) { return (uint64_t)a * b >> 32; }
inline u16 half_of(float x) {
    const _Float16 h = (_Float16)x;
    u16 r;
    memcpy(&r, &h, 2);
    return r;
}
inline float float_of_half(u16 x) {
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
}
inline u16 bfloat_of(float x) {
    u32 u;
    memcpy(&u, &x, 4);
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline u32 pack_halves(float low, float high) { return half_of(low) | (u32)half_of(high) << 16; }
inline u32 add_halves(u32 a, u32 b) {
    return pack_halves(float_of_half(a) + float_of_half(b), float_of_half(a >> 16) + float_of_half(b >> 16));
}
inline u32 multiply_halves(u32 a, u32 b) {
    return pack_halves(float_of_half(a) * float_of_half(b), float_of_half(a >> 16) * float_of_half(b >> 16));
}
inline u32 multiply_halves_again(u32 a, u32 b) { return multiply_halves(a, b); }
inline u32 transpose(u32 pair) {
    u32* word = emulator::warp().word;
    const int lane = emulator::lane(), g = lane >> 2, c = lane & 3;
    word[lane] = pair;
    emulator::meet_warp();
    const u32 low = word[2 * c * 4 + g / 2] >> (16 * (g & 1)) & 0xffff, high = word[(2 * c + 1) * 4 + g / 2] >> (16 * (g & 1));
    emulator::meet_warp();
    return low | high << 16;
}
inline int warp_max(int x) {
    emulator::warp().word[emulator::lane()] = (u32)x;
    emulator::meet_warp();
    int top = x;
    for (u32 other : emulator::warp().word) top = std::max(top, (int)other);
    emulator::meet_warp();
    return top;
}
template <class T>
void opaque(T&) {}
inline void keep_order() {}
inline int thread_number() { return threadIdx.x; }
inline int block_number_y() { return emulator::block.y; }
inline int load_fresh(const int* p) { return *p; }
inline u32 shared_address(const void* p) {
    return (u32)((const char*)p - (const char*)emulator::memory.data()) + emulator::WINDOW;
}
inline void barrier_init(u32 barrier, int threads) {
    emulator::aligned(barrier, 8);
    emulator::Gate& gate = emulator::barriers[barrier];
    gate = emulator::Gate();
    gate.size = threads;
}
inline void barrier_arrive(u32 barrier) {
    emulator::Gate& gate = emulator::barriers[barrier];
    if (++gate.arrived == gate.size) gate.generation++;
}
inline void barrier_wait(u32 barrier) {
    emulator::Gate& gate = emulator::barriers[barrier];
    if (gate.generation) return;
    emulator::now->waits = &gate, emulator::now->generation = 0;
    swapcontext(&emulator::now->context, &emulator::scheduler);
}
inline void prefetch_line(const void*) {}
inline void prefetch_bulk(const void*, u32) {}
inline void let_next_start() {}
inline void wait_for_earlier() {}
template <class T>
void store_shared_level(T* p, T v) {
    *p = v;
}
template <class T>
T load_shared_level(const T* p) {
    return *p;
}

inline float float_of_bfloat(u16 x) { return __int_as_float((int)((u32)x << 16)); }

// mma.m16n8k16 with numbers of 16 bits that `number` reads.
inline void multiply_fragments(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, float (*number)(u16)) {
    auto& in = emulator::warp().in;
    const int lane = emulator::lane(), g = lane >> 2, q = lane & 3;
    for (int i = 0; i < 4; i++) in[lane][i] = a[i];
    in[lane][4] = b0, in[lane][5] = b1;
    emulator::meet_warp();
    for (int o = 0; o < 4; o++) {
        const int row = g + (o >> 1) * 8, column = 2 * q + (o & 1);
        float s = 0;
        for (int k = 0; k < 16; k++)
            s += number(in[(row & 7) * 4 + (k & 7) / 2][(row >> 3) + 2 * (k >> 3)] >> (16 * (k & 1))) *
                 number(in[column * 4 + (k & 7) / 2][4 + (k >> 3)] >> (16 * (k & 1)));
        c[o] += s;
    }
    emulator::meet_warp();
}
inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_fragments(c, a, b0, b1, float_of_half);
}
inline void multiply_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    auto& in = emulator::warp().in;
    const int lane = emulator::lane(), g = lane >> 2, q = lane & 3;
    in[lane][0] = a[0], in[lane][1] = a[2];
    for (int i = 0; i < 4; i++) in[lane][2 + i] = b[i];
    emulator::meet_warp();
    auto half = [](u32 pair, int which) { return float_of_half(pair >> (16 * which)); };
    for (int o = 0; o < 4; o++) {
        const int column = 2 * q + (o & 1);
        float s = 0;
        for (int j = 0; j < 16; j++) {  // the number kept from k = 2 j and 2 j + 1
            const int k = 2 * j + (o >> 1);
            s += half(in[g * 4 + j / 2 % 4][j / 8], j & 1) * half(in[column * 4 + k / 2 % 4][2 + k / 8], k & 1);
        }
        c[o] += s;
    }
    emulator::meet_warp();
}
inline void multiply_bfloats(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_fragments(c, a, b0, b1, float_of_bfloat);
}
