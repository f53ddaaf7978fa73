// Nearest centroids and page writing, shared by prefill's encode and decode's append. Distances are exact float32:
// argmin |x - c|^2 is argmax x.c - |c|^2 / 2, and ties go to the lowest code, as torch.argmin gives on one thread.
// Defines from the launch: PQ_DIM, PQ_SUBSPACES, PQ_BITS, PQ_TABLE_BYTES.
#pragma once
#include "softmax.cuh"

constexpr int SUB = PQ_DIM / PQ_SUBSPACES, CENTROIDS = 1 << PQ_BITS;
constexpr int TABLE_FLOATS = CENTROIDS * (SUB + 1);  // the centroids of a subspace, then their half norms
constexpr int BLOCK = 8;                             // centroids whose maximum is taken before one comparison
typedef Places<PQ_SUBSPACES, PQ_BITS> PagePlaces;

// Four neighbouring centroids, in 16-byte loads: a load that all lanes share still moves 512 bytes into registers,
// which is what limits this search with fewer than eight vectors a lane.
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

// One warp brings one subspace's centroids into its own part of shared memory.
__device__ __forceinline__ void load_centroids(const u16* centroids, float* table, int lane) {
    __syncwarp();
    for (int code = lane; code < CENTROIDS; code += 32) {
        float norm = 0.f;
#pragma unroll
        for (int i = 0; i < SUB; i++) {
            const float x = float_of_half(centroids[code * SUB + i]);
            table[code * SUB + i] = x;
            norm += x * x;
        }
        table[CENTROIDS * SUB + code] = 0.5f * norm;
    }
    __syncwarp();
}

// Codes of COUNT vectors. The maximum of a block of centroids costs one instruction each; only blocks are compared, and
// the best block is searched again for the first centroid that reaches it.
template <int COUNT>
__device__ __forceinline__ void nearest(const float* table, const float (&v)[COUNT][SUB], int (&code)[COUNT]) {
    float best[COUNT];
    int block[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) best[j] = -infinity(), block[j] = 0;
    for (int first = 0; first < CENTROIDS; first += BLOCK) {
        float top[COUNT];
#pragma unroll
        for (int part = 0; part < BLOCK; part += 4) {
            const Centroids c(table, first + part);
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                const float low = fmaxf(c.closeness(0, v[j]), c.closeness(1, v[j]));
                const float high = fmaxf(c.closeness(2, v[j]), c.closeness(3, v[j]));
                top[j] = part ? fmaxf(top[j], fmaxf(low, high)) : fmaxf(low, high);
            }
        }
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            if (top[j] > best[j]) best[j] = top[j], block[j] = first;
    }
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        code[j] = block[j];
#pragma unroll
        for (int part = BLOCK - 4; part >= 0; part -= 4) {
            const Centroids c(table, block[j] + part);
#pragma unroll
            for (int i = 3; i >= 0; i--)
                if (c.closeness(i, v[j]) == best[j]) code[j] = block[j] + part + i;
        }
    }
}

// Bytes of a tile's stream from its codes, one byte each in `codes`: 8 codes are PQ_BITS bytes.
__device__ __forceinline__ void write_tile(const u8* codes, u8* to, int thread, int threads) {
    for (int i = thread; i < TILE * PQ_SUBSPACES / 8; i += threads) {
        const u8* from = codes + i * 8;
        if (PQ_BITS == 8) {
            *(uint2*)(to + i * 8) = *(const uint2*)from;
        } else {
            unsigned long long bits = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) bits |= (unsigned long long)from[j] << (j * PQ_BITS);
#pragma unroll
            for (int j = 0; j < PQ_BITS; j++) to[i * PQ_BITS + j] = (u8)(bits >> (8 * j));
        }
    }
}

template <int WARPS>
struct EncodeScratch {
    float tables[WARPS][TABLE_FLOATS];
};
