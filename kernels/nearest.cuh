// The nearest centroids of vectors, all centroids or those of a cell being compared; knows nothing of pages.
#pragma once
#include "device.cuh"

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Four neighbouring centroids, in 16-byte loads: a load that all lanes share still moves 512 bytes into registers,
// which is what limits this search with fewer than eight vectors a lane.
template <int SUB, int CENTROIDS>
struct Centroids {
    float x[4 * SUB], half_norm[4];

    __device__ __forceinline__ Centroids(const float* table, int code) {
#pragma unroll
        for (int i = 0; i <= SUB; i++) {
            const float4 v =
                ((const float4*)(i < SUB ? table + code * SUB : table + CENTROIDS * SUB + code))[i < SUB ? i : 0];
            float* to = i < SUB ? x + 4 * i : half_norm;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }

    __device__ __forceinline__ float closeness(int which, const float (&v)[SUB]) const {
        float s = -half_norm[which];
#pragma unroll
        for (int i = 0; i < SUB; i++) s = fmaf(v[i], x[which * SUB + i], s);
        return s;
    }
};

// Codes of COUNT vectors: argmin |x - c|^2, of equal ones the lowest. First the block of centroids that has it, as
// argmax x.c - |c|^2 / 2: the maximum of a block costs one instruction for each centroid, and only blocks are compared.
// Then the distances within the block, from the centroids as they came (`halves`), which are fewer bytes: here every
// lane reads its own.
template <int COUNT, int SUB, int CENTROIDS>
__device__ __forceinline__ void nearest(const float* table, const u16* halves, const float (&v)[COUNT][SUB],
                                        int (&code)[COUNT]) {
    typedef Centroids<SUB, CENTROIDS> Four;
    constexpr int BLOCK = 8;
    float best[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) best[j] = -infinity(), code[j] = 0;
    for (int first = 0; first < CENTROIDS; first += BLOCK) {
        float top[COUNT];
#pragma unroll
        for (int part = 0; part < BLOCK; part += 4) {
            const Four c(table, first + part);
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                const float low = fmaxf(c.closeness(0, v[j]), c.closeness(1, v[j]));
                const float high = fmaxf(c.closeness(2, v[j]), c.closeness(3, v[j]));
                top[j] = part ? fmaxf(top[j], fmaxf(low, high)) : fmaxf(low, high);
            }
        }
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            if (top[j] > best[j]) best[j] = top[j], code[j] = first;
    }
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const uint4* from = (const uint4*)(halves + code[j] * SUB);
        u32 words[SUB * 4];
#pragma unroll
        for (int i = 0; i < SUB; i++) {
            const uint4 x = from[i];
            words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
        }
        float least = infinity();
        int at = code[j];
#pragma unroll
        for (int n = 0; n < BLOCK; n++) {
            float distance = 0.f;
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int number = n * SUB + i;
                const float d = v[j][i] - float_of_half((u16)(words[number / 2] >> 16 * (number & 1)));
                distance = fmaf(d, d, distance);
            }
            if (distance < least) least = distance, at = code[j] + n;
        }
        code[j] = at;
    }
}

// The same of vectors of two numbers, by the list of the cell that each lies in: four distances in place of all.
// hf_pqcache/codebook/cells.py makes the lists and has the same numbers.
constexpr int CELLS = 64;
constexpr float REACH = 1.125f;
constexpr u32 MANY = 0xff;

template <class C>
__device__ constexpr bool has_cells() {
    return C::NUMBERS == 2 && C::BITS > 4;
}
__device__ __forceinline__ int cell_at(float x) {
    return (int)fminf(fmaxf(fmaf(x, CELLS / (2.f * REACH), CELLS / 2.f), 0.f), CELLS - 1.f);
}
template <int COUNT, int CENTROIDS>
__device__ __forceinline__ void nearest_by_cells(const u32* cells, const float* table, const u16* halves,
                                                 const float (&v)[COUNT][2], int (&code)[COUNT]) {
    u32 list[COUNT];
    bool has_many = false;
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        list[j] = cells[cell_at(v[j][1]) * CELLS + cell_at(v[j][0])];
        has_many |= list[j] == MANY;
        float least = infinity();
        code[j] = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int at = list[j] >> 8 * n & 255;
            const u32 centroid = ((const u32*)halves)[at < CENTROIDS ? at : 0];  // of MANY, any
            const float x = v[j][0] - float_of_half((u16)centroid), y = v[j][1] - float_of_half((u16)(centroid >> 16));
            const float distance = fmaf(y, y, x * x);
            if (distance < least) least = distance, code[j] = at;
        }
    }
    if (!__any_sync(~0u, has_many)) return;
    int other[COUNT];
    nearest<COUNT, 2, CENTROIDS>(table, halves, v, other);
#pragma unroll
    for (int j = 0; j < COUNT; j++)
        if (list[j] == MANY) code[j] = other[j];
}
