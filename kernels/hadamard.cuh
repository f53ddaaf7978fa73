// The rotation of pages: the orthonormal Hadamard matrix, its own inverse, in Sylvester's order. A size that is no
// power of two is split into its binary powers, the largest first, each with a matrix of its own: 80 = 64 + 16.
#pragma once
#include "device.cuh"

// Size of the block that holds number `at` of `dim`.
__device__ constexpr int hadamard_block(int dim, int at) {
    for (int size = 1 << 12, begin = 0; size; size >>= 1) {
        if (!(dim & size)) continue;
        begin += size;
        if (at < begin) return size;
    }
    return 1;
}

// 1 / sqrt(a power of two).
__device__ constexpr float hadamard_scale(int size) {
    float x = 1.f;
    for (; size >= 4; size /= 4) x *= 0.5f;
    return size == 2 ? x * 0.70710678118654752f : x;
}

// Rotates a vector that a warp holds: lane i has numbers i + 32 j in x[j]; those beyond DIM may be anything.
template <int DIM>
__device__ __forceinline__ void rotate(float (&x)[(DIM + 31) / 32], int lane) {
    constexpr int N = (DIM + 31) / 32;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const bool is_whole = hadamard_block(DIM, 32 * j) >= 32;
        const int size = is_whole ? hadamard_block(DIM, 32 * j) : hadamard_block(DIM, 32 * j + lane);
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) {
            const float other = __shfl_xor_sync(~0u, x[j], bit);
            const float turned = lane & bit ? other - x[j] : x[j] + other;
            if (size > bit) x[j] = turned;
        }
        x[j] *= hadamard_scale(size);
    }
#pragma unroll
    for (int bit = 1; bit < N; bit *= 2)
#pragma unroll
        for (int j = 0; j < N; j++)
            if (!(j & bit) && hadamard_block(DIM, 32 * j) > 32 * bit) {
                const float low = x[j], high = x[j + bit < N ? j + bit : j];
                x[j] = low + high, x[j + bit < N ? j + bit : j] = low - high;
            }
}
