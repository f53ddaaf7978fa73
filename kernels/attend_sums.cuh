// A warp's sums of weighted values: adding to them, rotating those of the window, storing them for the join.
#pragma once
#include "attend_tables.cuh"
#include "hadamard.cuh"

// Whether the number of a sum is its place's bits - (slot, lane column, odd unit, half, odd number) from the top - and
// every block of the rotation is whole slots, or the first of its slot and alone in it.
__device__ constexpr bool lanes_rotate() {
    constexpr int SLOT = 8 * ValueTable::WIDTH;
    if (ValueTable::WIDTH != ValueTable::C::UNIT_NUMBERS) return false;
    for (int s = 0; s < ValueTable::SLOTS; s++) {
        const int size = hadamard_block(DIM, s * SLOT);
        if (size < SLOT && s * SLOT + size < DIM) return false;
    }
    return true;
}

struct Sums {
    static constexpr int SLOTS = ValueTable::SLOTS, HALVES = ValueTable::PAIRS;

    const int lane, g, c;           // fragment coordinates: g = lane / 4, c = lane % 4
    u32 value_offset;               // of the lane's copies in a table row
    u32 p[4];                       // weights of a tile, times the scales of the values
    float sums[SLOTS * HALVES][4];  // head g: (first, second number) of units 8 s + 2 c and 8 s + 2 c + 1

    __device__ __forceinline__ explicit Sums(int lane_) : lane(lane_), g(lane_ >> 2), c(lane_ & 3) {
        value_offset = lane % ValueTable::COPIES * ValueTable::PAIRS * 4;
        opaque(value_offset);
#pragma unroll
        for (int i = 0; i < SLOTS * HALVES; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
#pragma unroll
        for (u32& weights : p) weights = 0;
    }

    __device__ __forceinline__ void shrink_sums(float factor) {
#pragma unroll
        for (int i = 0; i < SLOTS * HALVES; i++)
            sums[i][0] *= factor, sums[i][1] *= factor, sums[i][2] *= factor, sums[i][3] *= factor;
    }

    // ---- values: weights are a sparse matrix, rows g and g + 8 with the same weights for the two numbers of a pair
    __device__ __forceinline__ void add_values(const LaneCodes<ValueTable, true>& codes) {
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            u32 x[4][HALVES];
#pragma unroll
            for (int t = 0; t < 4; t++) look_up<ValueTable>(codes.row(4 * s + t, value_offset, lane), 1, x[t]);
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                const u32 pairs[4] = {x[0][h], x[1][h], x[2][h], x[3][h]};
                multiply_sparse(sums[s * HALVES + h], p, pairs);
            }
        }
    }

    // ---- where the sums are
    // The number of the output that sums[s * HALVES + h][r] is; DIM or more for none.
    __device__ __forceinline__ int number_of(int s, int h, int r) const {
        const int unit = 8 * s + 2 * c + (r & 1), in_unit = 2 * h + (r >> 1);
        return unit < ValueTable::C::UNITS && in_unit < ValueTable::C::UNIT_NUMBERS
                   ? unit * ValueTable::C::UNIT_NUMBERS + in_unit
                   : DIM;
    }

    // The sums of the window, rotated as those of codes are.
    __device__ __forceinline__ void rotate_sums(float* scratch) {
        if (lanes_rotate())
            rotate_in_lanes();
        else
            rotate_by_way_of(scratch);
    }

    __device__ __forceinline__ void rotate_in_lanes() {
        constexpr int WIDTH = ValueTable::WIDTH, SLOT = 8 * WIDTH;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            const int size = hadamard_block(DIM, s * SLOT);
            const float scale = hadamard_scale(size);
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float (&x)[4] = sums[s * HALVES + h];
                butterfly(x[0], x[2], size > 1), butterfly(x[1], x[3], size > 1);
                butterfly(x[0], x[1], size > WIDTH), butterfly(x[2], x[3], size > WIDTH);
#pragma unroll
                for (int r = 0; r < 4; r++) {
#pragma unroll
                    for (int bit = 1; bit < 4; bit *= 2) {
                        const float other = __shfl_xor_sync(~0u, x[r], bit),
                                    turned = c & bit ? other - x[r] : x[r] + other;
                        if (size > 2 * WIDTH * bit) x[r] = turned;
                    }
                    x[r] *= scale;
                }
            }
#pragma unroll
            for (int bit = 1; bit < HALVES; bit *= 2)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    if (!(h & bit))
#pragma unroll
                        for (int r = 0; r < 4; r++)
                            butterfly(sums[s * HALVES + h][r], sums[s * HALVES + (h + bit < HALVES ? h + bit : h)][r],
                                      size > 2 * bit);
        }
#pragma unroll
        for (int bit = 1; bit < SLOTS; bit *= 2)
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                if (!(s & bit) && hadamard_block(DIM, s * SLOT) > SLOT * bit)
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
#pragma unroll
                        for (int r = 0; r < 4; r++)
                            butterfly(sums[s * HALVES + h][r], sums[(s + bit < SLOTS ? s + bit : s) * HALVES + h][r],
                                      true);
    }
    static __device__ __forceinline__ void butterfly(float& low, float& high, bool yes) {
        if (!yes) return;
        const float x = low, y = high;
        low = x + y, high = x - y;
    }

    // The same through shared memory, a head at a time, for all other shapes.
    __device__ __forceinline__ void rotate_by_way_of(float* scratch) {
        constexpr int N = (DIM + 31) / 32;
        for (int head = 0; head < 8; head++) {
            float x[N];
            __syncwarp();
            if (g == head) visit_sums([&](int number, float& sum) { scratch[number] = sum; });
            __syncwarp();
#pragma unroll
            for (int j = 0; j < N; j++) x[j] = lane + 32 * j < DIM ? scratch[lane + 32 * j] : 0.f;
            rotate<DIM>(x, lane);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < N; j++)
                if (lane + 32 * j < DIM) scratch[lane + 32 * j] = x[j];
            __syncwarp();
            if (g == head) visit_sums([&](int number, float& sum) { sum = scratch[number]; });
        }
        __syncwarp();
    }

    template <class Visit>
    __device__ __forceinline__ void visit_sums(Visit visit) {
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    if (number_of(s, h, r) < DIM) visit(number_of(s, h, r), sums[s * HALVES + h][r]);
    }

    // The lane's sums of head g into the row of a join.
    __device__ __forceinline__ void store_sums(float* row, float factor) {
        constexpr int NUMBERS = ValueTable::C::UNIT_NUMBERS;
        if (NUMBERS == ValueTable::WIDTH && ValueTable::C::UNITS % 8 == 0) {
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                float4* to = (float4*)(row + (8 * s + 2 * c) * NUMBERS);
                if (HALVES == 1) {
                    const float (&x)[4] = sums[s];
                    *to = make_float4(x[0] * factor, x[2] * factor, x[1] * factor, x[3] * factor);
                } else {
#pragma unroll
                    for (int h = 0; h + 1 < HALVES; h += 2) {
                        const float (&x)[4] = sums[s * HALVES + h];
                        const float (&y)[4] = sums[s * HALVES + h + 1];
                        to[h / 2] = make_float4(x[0] * factor, x[2] * factor, y[0] * factor, y[2] * factor);
                        to[(NUMBERS + 2 * h) / 4] =
                            make_float4(x[1] * factor, x[3] * factor, y[1] * factor, y[3] * factor);
                    }
                }
            }
        } else {
            visit_sums([&](int number, float& sum) { row[number] = sum * factor; });
        }
    }
};
