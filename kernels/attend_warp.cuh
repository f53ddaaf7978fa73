// One warp's part of decode attention over codes: scores, softmax, scales, the exact window. Knows nothing of where
// pages are; attend_codes.cu feeds it and explains the idea.
#pragma once
#include "attend_sums.cuh"
#include "softmax.cuh"

// What a warp makes of the statistics of a piece, fp16.
struct PieceScales {
    uint4 keys[KeyTable::STEPS * 4];  // (step, lane column): pair 0 of the means and of the scales, pair 1 of them
    u32 values[PIECE * 8];            // (tile, tokens 2 i and 2 i + 1)
};

// The statistics themselves, as a warp's lanes hold them: four channels, two tokens.
struct Statistics {
    static constexpr int N = (DIM + 127) / 128;
    u32 means[N], scales[N], values, step;

    // keys: what follows the codes of a page's keys; values_: the scales of the piece's tokens.
    __device__ __forceinline__ void ask(const u8* keys, const u8* values_, int lane) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            means[i] = scales[i] = 0;
            if ((lane + 32 * i) * 4 < DIM) {
                means[i] = load_stream((const u32*)keys + lane + 32 * i);
                scales[i] = load_stream((const u32*)(keys + DIM) + lane + 32 * i);
            }
        }
        values = lane < PIECE * 8 ? load_stream((const u16*)values_ + lane) : 0;
        step = load_stream((const u16*)(keys + 2 * DIM));
    }
};

struct Attention : Sums {
    static constexpr int STEPS = KeyTable::STEPS;

    const AttendArgs& a;
    u32 key_offset;            // of the lane's copies in a table row
    u32 query[STEPS][2];       // head g, times the scales of the page
    float product[4];          // of a tile: tokens g and g + 8, heads 2 c and 2 c + 1
    float factor[2], mean[2];  // what makes a product an exponent of 2, heads 2 c and 2 c + 1
    float reference[2], weight_sum[2];
    int value_zero;   // the sums count 2^((value_zero - LOG_ZERO) / LOG_STEPS)
    int value_limit;  // the largest scale of values that they can take

    __device__ __forceinline__ Attention(const AttendArgs& a_, int lane)
        : Sums(lane), a(a_), value_zero(LOG_ZERO), value_limit(-1) {
        key_offset = lane % KeyTable::COPIES * KeyTable::PAIRS * 4;
        opaque(key_offset);
#pragma unroll
        for (int h = 0; h < 2; h++) reference[h] = NOTHING, weight_sum[h] = 0.f;
    }

    // ---- scores: keys are the rows of a product, query heads its columns
    __device__ __forceinline__ void score(const LaneCodes<KeyTable, false>& codes) {
        constexpr int P = KeyTable::PAIRS, GROUP = P <= 2 ? 1 : P / 2;  // steps that a look-up serves
        float one[4] = {0, 0, 0, 0}, two[4] = {0, 0, 0, 0};  // two sums: a product need not wait for the one before
        auto step = [&](int k, u32 a0, u32 a1, u32 a2, u32 a3) {
            const u32 keys[4] = {a0, a1, a2, a3};
            if (k >= STEPS) return;
            if (k & 1)
                multiply(two, keys, query[k][0], query[k][1]);
            else
                multiply(one, keys, query[k][0], query[k][1]);
        };
#pragma unroll
        for (int i = 0; i < STEPS / GROUP + (STEPS % GROUP != 0); i++) {
            u32 x[2][P], y[2][P];
            if (P == 1) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    look_up<KeyTable>(codes.row(4 * i + half, key_offset, lane), 0, x[half]);
                    look_up<KeyTable>(codes.row(4 * i + 2 + half, key_offset, lane), 0, y[half]);
                }
                step(i, x[0][0], x[1][0], y[0][0], y[1][0]);
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++)
                    look_up<KeyTable>(codes.row(2 * i + half, key_offset, lane), 0, x[half]);
#pragma unroll
                for (int r = 0; r < P / 2; r++)
                    step(i * (P / 2) + r, x[0][2 * r], x[1][2 * r], x[0][2 * r + 1 < P ? 2 * r + 1 : 0],
                         x[1][2 * r + 1 < P ? 2 * r + 1 : 0]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) product[i] = one[i] + two[i];
    }

    // ---- softmax
    // The exponents of 2 that the products stand for; `low` and `high` join those of tokens g and g + 8.
    __device__ __forceinline__ void exponents(float (&x)[4], float low, float high) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = fmaf(product[i], factor[i & 1], mean[i & 1]);
            if (PQ_SOFTCAP) x[i] = soft_cap(a, x[i]) * a.scale_log2;
            if (PQ_MASK) x[i] += i < 2 ? low : high;
        }
    }

    // Weights of the tile, head g: tokens 2 c and 2 c + 1 in low, those 8 further in high.
    __device__ __forceinline__ void weights(float bias_low, float bias_high, u32& low, u32& high) {
        float x[4];
        exponents(x, bias_low, bias_high);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] -= reference[i & 1];
        // The reference moves only when a score beats it by 2^8: weights stay below 256, far from fp16's 65504.
        if (__any_sync(~0u, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) > 8.f)) {
            exponents(x, bias_low, bias_high);
            move_reference(x);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] -= reference[i & 1];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = exp2_fast(x[i]);
        weight_sum[0] += x[0] + x[2], weight_sum[1] += x[1] + x[3];
        low = transpose(pack_halves(x[0], x[1])), high = transpose(pack_halves(x[2], x[3]));
    }

    // What the lane knows of heads 2 c and 2 c + 1, of head g.
    __device__ __forceinline__ float of_row(const float (&x)[2]) const {
        const float even = __shfl_sync(~0u, x[0], g >> 1), odd = __shfl_sync(~0u, x[1], g >> 1);
        return g & 1 ? odd : even;
    }

    __device__ __forceinline__ void move_reference(const float (&x)[4]) {
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = fmaxf(x[h], x[2 + h]);
#pragma unroll
            for (int m = 4; m < 32; m *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
            const float now = fmaxf(reference[h], top);
            shrink[h] = exp2_fast(reference[h] - now);
            reference[h] = now;
            weight_sum[h] *= shrink[h];
        }
        shrink_sums(of_row(shrink));
    }

    // What was scored, as weights of values with these scales.
    __device__ __forceinline__ void weigh(const u32* scales, float bias_low, float bias_high) {
        u32 low, high;
        weights(bias_low, bias_high, low, high);
        const u32 first = scales[c], second = scales[c + 4];
        p[0] = multiply_halves(low, first), p[1] = multiply_halves_again(low, first);
        p[2] = multiply_halves(high, second), p[3] = multiply_halves_again(high, second);
    }

    // ---- a piece of a page: its statistics become scales of the query and of the weights
    // 2 to the power of (byte `at` of x) / LOG_STEPS + shift. A byte becomes a number as the last one of 2^23.
    static __device__ __forceinline__ float scale_of(u32 x, int at, float shift) {
        const float number = __int_as_float((int)pick_bytes(x, 0x4b000000, 0x7650 | at));
        return exp2_fast(fmaf(number, 1.f / LOG_STEPS, shift - 8388608.f / LOG_STEPS));
    }
    static __device__ __forceinline__ float shift_of(int zero) { return (float)zero * (-1.f / LOG_STEPS); }

    // Two int8, bytes `at` and `at + 1` of x, as fp16: 1024 + (x + 128) first.
    static __device__ __forceinline__ u32 halves_of_bytes(u32 x, int at) {
        const u32 numbers = pick_bytes(x ^ 0x80808080u, 0x64646464u, at ? 0x4342 : 0x4140);
        return add_halves(numbers, 0xe480e480u);  // -1152
    }

    // rotated: the query of each head in pairs, (two steps, lane). query_factors: what makes a product with it an
    // exponent.
    __device__ __forceinline__ void start_piece(const Statistics& given, PieceScales& made, const uint4* rotated,
                                                const float* query_factors) {
        __syncwarp();  // all lanes have read what was made for the piece before
        const int top = max((int)(given.values & 255), (int)(given.values >> 8));
        if (__any_sync(~0u, top > value_limit)) {  // scales stay below 2^7, weights times scales below 2^15
            const int now = warp_max(top);
            const float factor = exp2_fast((float)(value_zero - now) * (1.f / LOG_STEPS));
            shrink_sums(factor);
#pragma unroll
            for (u32& weights : p)
                weights = multiply_halves(weights, pack_halves(factor, factor));  // of a tile not added yet
            value_zero = now, value_limit = now + 7 * LOG_STEPS;
        }
#pragma unroll
        for (int i = 0; i < Statistics::N; i++) {
            const int number = (lane + 32 * i) * 4;
            if (number < DIM) {
                const float shift = shift_of(LOG_ZERO);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 means = halves_of_bytes(given.means[i], 2 * half);
                    const u32 scales = pack_halves(scale_of(given.scales[i], 2 * half, shift),
                                                   scale_of(given.scales[i], 2 * half + 1, shift));
                    put(made, number + 2 * half, means, scales);
                }
            }
        }
        if (lane < PIECE * 8) {
            const float shift = shift_of(value_zero);
            made.values[lane] = pack_halves(scale_of(given.values, 0, shift), scale_of(given.values, 1, shift));
        }
        __syncwarp();
        float one[4] = {0, 0, 0, 0}, two[4] = {0, 0, 0, 0};
        auto step = [&](int k, u32 q0, u32 q1) {
            if (k >= STEPS) return;
            const uint4 x = made.keys[k * 4 + c];
            query[k][0] = multiply_halves(q0, x.y), query[k][1] = multiply_halves(q1, x.w);
            // Eight times the means as keys; the scales come along, and their products are not used.
            const u32 keys[4] = {x.x, x.y, x.z, x.w};
            multiply(k & 1 ? two : one, keys, q0, q1);
        };
#pragma unroll
        for (int n = 0; n < (STEPS + 1) / 2; n++) {
            const uint4 q = rotated[n * 32 + lane];
            step(2 * n, q.x, q.y), step(2 * n + 1, q.z, q.w);
        }
        const float mean_step = float_of_half((u16)given.step);
#pragma unroll
        for (int h = 0; h < 2; h++)
            factor[h] = query_factors[2 * c + h], mean[h] = (one[h] + two[h]) * mean_step * factor[h];
    }

    // Channels `number` and `number + 1` of the key statistics to where the lanes read them.
    static __device__ __forceinline__ void put(PieceScales& made, int number, u32 means, u32 scales) {
        const KeyPair p(number);
        if (KeyTable::C::UNIT_NUMBERS % 2 == 0) {
            ((uint2*)made.keys)[(p.k * 4 + p.c) * 2 + p.j] = uint2{means, scales};
        } else {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const KeyPair p(number + odd);
                u16* to =
                    (u16*)made.keys + ((p.k * 4 + p.c) * 2 + p.j) * 4 + (number + odd) % KeyTable::C::UNIT_NUMBERS % 2;
                to[0] = (u16)(means >> 16 * odd), to[2] = (u16)(scales >> 16 * odd);
            }
        }
    }

    // ---- 16 slots of the exact window, which is not rotated
    static __device__ __forceinline__ uint4 load_numbers(const u16* row, int number) {
        if (number >= DIM) return uint4{0, 0, 0, 0};
        if (DIM % 8 == 0) return load_global_quad((const uint4*)(row + number));
        const u32* at = (const u32*)(row + number);
        uint4 x = {load_global(at), load_global(at + 1), 0, 0};
        if (number + 4 < DIM) x.z = load_global(at + 2), x.w = load_global(at + 3);
        return x;
    }

    // The lane's 8 neighbouring numbers are two steps of the product, of the query as of the keys.
    static constexpr int WINDOW_LOADS = (DIM + 31) / 32;
    __device__ __forceinline__ void score_window(const u16* query, const u16* low_key, const u16* high_key) {
        float one[4] = {0, 0, 0, 0}, two[4] = {0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < WINDOW_LOADS; n++) {
            const int at = 32 * n + 8 * c;
            const uint4 q = load_numbers(query, at), x = load_numbers(low_key, at), y = load_numbers(high_key, at);
            const u32 first[4] = {halves_of(x.x), halves_of(y.x), halves_of(x.y), halves_of(y.y)};
            const u32 second[4] = {halves_of(x.z), halves_of(y.z), halves_of(x.w), halves_of(y.w)};
            multiply(one, first, halves_of(q.x), halves_of(q.y));
            multiply(two, second, halves_of(q.z), halves_of(q.w));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) product[i] = one[i] + two[i];
        const float f = PQ_SOFTCAP ? 1.f : a.scale_log2;
        factor[0] = factor[1] = f, mean[0] = mean[1] = 0.f;
    }

    // Slots without a token may hold anything: their keys get no weight, and their values, which might be NaN, are made
    // zero. query: of the lane's head g.
    __device__ __forceinline__ void window_tile(const Row& row, int ring_first, int first_slot, const u16* query,
                                                const u16* keys, const u16* values) {
        const int last_slot = row.slots() - 1;
        score_window(query, keys + (i64)min(first_slot + g, last_slot) * DIM,
                     keys + (i64)min(first_slot + g + 8, last_slot) * DIM);
        const u32 held = __ballot_sync(~0u, row.holds(first_slot + (lane & (TILE - 1)), ring_first));
        float bias[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = g + 8 * i;
            if (PQ_MASK) {
                const Work work(a);
                const int column = a.starts[work.batch_row] + row.token_in(first_slot + at, ring_first);
                bias[i] = mask_bias(a, work.batch_row, column);
            }
            if (!(held >> at & 1)) {
                product[2 * i] = product[2 * i + 1] = 0.f;  // it might be NaN
                bias[i] = -infinity();
            }
        }
        u32 low, high;
        window_weights(bias[0], bias[1], low, high);
        u32 again_low = low, again_high = high;
        opaque(again_low), opaque(again_high);
        p[0] = low, p[1] = again_low, p[2] = high, p[3] = again_high;
        const u16* tokens[4];  // the lane's first unit of each
#pragma unroll
        for (int t = 0; t < 4; t++)
            tokens[t] = values + (i64)min(first_slot + c + 4 * t, last_slot) * DIM + g * ValueTable::C::UNIT_NUMBERS;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                u32 x[4];
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const bool is_there = (held >> (c + 4 * t) & 1) &&
                                          (ValueTable::C::UNITS % 8 == 0 || 8 * s + g < ValueTable::C::UNITS);
                    x[t] = is_there
                               ? halves_of(ValueTable::load_pair(tokens[t] + 8 * s * ValueTable::C::UNIT_NUMBERS, h))
                               : 0u;
                }
                multiply_sparse(sums[s * HALVES + h], p, x);
            }
        }
    }

    // As weights(), where a token may be hidden without a mask.
    __device__ __forceinline__ void window_weights(float bias_low, float bias_high, u32& low, u32& high) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = fmaf(product[i], factor[i & 1], mean[i & 1]);
            if (PQ_SOFTCAP) x[i] = soft_cap(a, x[i]) * a.scale_log2;
            x[i] += i < 2 ? bias_low : bias_high;
        }
        move_reference(x);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = exp2_fast(x[i] - reference[i & 1]);
        weight_sum[0] += x[0] + x[2], weight_sum[1] += x[1] + x[3];
        low = transpose(pack_halves(x[0], x[1])), high = transpose(pack_halves(x[2], x[3]));
    }
};
