// Writes pages of codes, for prefill's encode and decode's append: rotates a page's vectors, takes its statistics,
// searches the nearest centroids. The two call the same functions, so that a page gets the same bytes by either way.
// Defines from the launch: PQ_DIM.
#pragma once
#include "hadamard.cuh"
#include "nearest.cuh"
#include "page.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int DIM = PQ_DIM, NUMBERS_A_LANE = (DIM + 31) / 32, WIDE = NUMBERS_A_LANE * 32;
constexpr int TOKENS = 64;  // that a block normalises and searches at a time: two for each lane

// The logarithmic scale of a magnitude, and what it divides by, as a factor.
__device__ __forceinline__ int log_scale(float magnitude) {
    const float e = log2_fast(magnitude) * LOG_STEPS + LOG_ZERO;
    return (int)rintf(fminf(fmaxf(e, 0.f), 255.f));
}
__device__ __forceinline__ float inverse_scale(int e) { return exp2_fast((float)(LOG_ZERO - e) * (1.f / LOG_STEPS)); }

// What a block needs of shared memory to encode pages of one side.
template <class C>
struct EncodeScratch {
    static constexpr int LINE = DIM + 1;                // lanes of a warp are tokens: a row apart is a bank apart
    float table[C::CENTROIDS * (C::NUMBERS + 1)];       // the centroids, then their half norms
    alignas(16) u16 halves[C::CENTROIDS * C::NUMBERS];  // the centroids as they came
    alignas(16) u32 cells[has_cells<C>() ? CELLS * CELLS : 4];
    union {  // statistics first
        struct {
            float sums[WARPS][WIDE], lows[WARPS][WIDE], highs[WARPS][WIDE];
        };
        u8 codes[TOKENS * C::M];  // in the order of their tiles' streams
    };
    float mean[WIDE], factor[WIDE];  // of the page's channels
    float tops[WARPS];
    float vectors[TOKENS * LINE];
};

// Encodes one (page, KV head) of a side. vector_of(t): where token t of the page lies, in the model's dtype.
// TOGETHER: vectors that a warp has on their way; one where many blocks hide how long they take.
template <class C, bool IS_VALUE, int TOGETHER>
struct PageEncoder {
    typedef EncodeScratch<C> Scratch;
    Scratch& s;
    const Block<u8> block;
    const int page_size, lane, warp;
    const float gain;
    float equaliser[NUMBERS_A_LANE];  // the lane's channels of it, inverted

    __device__ __forceinline__ PageEncoder(void* scratch, Block<u8> block_, int page_size_, const float* equaliser_,
                                           float gain_)
        : s(*(Scratch*)scratch),
          block(block_),
          page_size(page_size_),
          lane(threadIdx.x & 31),
          warp(threadIdx.x >> 5),
          gain(gain_) {
#pragma unroll
        for (int j = 0; j < NUMBERS_A_LANE; j++)
            equaliser[j] = !IS_VALUE && lane + 32 * j < DIM ? 1.f / equaliser_[lane + 32 * j] : 1.f;
    }

    // They are there after the first barrier of encode().
    __device__ __forceinline__ void load_centroids(const u16* centroids, const u32* cells) {
        if (has_cells<C>())
            for (int i = threadIdx.x; i < CELLS * CELLS / 4; i += THREADS)
                copy_async<16>(shared_address(s.cells) + i * 16, cells + i * 4);
        commit_copies();
        for (int code = threadIdx.x; code < C::CENTROIDS; code += THREADS) {
            float norm = 0.f;
#pragma unroll
            for (int i = 0; i < C::NUMBERS; i++) {
                const u16 half = centroids[code * C::NUMBERS + i];
                const float x = float_of_half(half);
                s.halves[code * C::NUMBERS + i] = half;
                s.table[code * C::NUMBERS + i] = x;
                norm += x * x;
            }
            s.table[C::CENTROIDS * C::NUMBERS + code] = 0.5f * norm;
        }
    }

    // The whole page's statistics; `writes`: they are stored as well. first, count: the tokens that encode() is told
    // next; its first ones stay in shared memory, rotated.
    template <class VectorOf>
    __device__ __forceinline__ void take_statistics(bool writes, int first, int count, VectorOf vector_of) {
        if (IS_VALUE) return;  // each token has its own
        float sum[NUMBERS_A_LANE], low[NUMBERS_A_LANE], high[NUMBERS_A_LANE];
#pragma unroll
        for (int j = 0; j < NUMBERS_A_LANE; j++) sum[j] = 0.f, low[j] = infinity(), high[j] = -infinity();
        for_rotated(0, page_size, vector_of, [&](int token, const float(&x)[NUMBERS_A_LANE]) {
#pragma unroll
            for (int j = 0; j < NUMBERS_A_LANE; j++)
                sum[j] += x[j], low[j] = fminf(low[j], x[j]), high[j] = fmaxf(high[j], x[j]);
            const int at = token - first;
            if (at < 0 || at >= min(count, TOKENS)) return;
            float* to = s.vectors + at * Scratch::LINE;
#pragma unroll
            for (int j = 0; j < NUMBERS_A_LANE; j++)
                if (lane + 32 * j < DIM) to[lane + 32 * j] = x[j];
        });
#pragma unroll
        for (int j = 0; j < NUMBERS_A_LANE; j++) {
            const int number = lane + 32 * j;
            s.sums[warp][number] = sum[j], s.lows[warp][number] = low[j], s.highs[warp][number] = high[j];
        }
        __syncthreads();
        float mean = 0.f, lowest = infinity(), highest = -infinity();
        const int number = threadIdx.x;
        if (number < DIM) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                mean += s.sums[w][number];
                lowest = fminf(lowest, s.lows[w][number]), highest = fmaxf(highest, s.highs[w][number]);
            }
            mean /= (float)page_size;
        }
        const int top_bits =
            warp_max(__float_as_int(fabsf(mean)));  // as integers, floats that are not negative keep their order
        if (lane == 0) s.tops[warp] = __int_as_float(top_bits);
        __syncthreads();
        float top = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.tops[w]);
        const u16 step_bits = half_of(fminf(top * (1.f / 127.f), 65504.f));
        const float step = float_of_half(step_bits);
        if (number < DIM) {
            const int level = step > 0.f ? (int)fminf(fmaxf(rintf(mean / step), -127.f), 127.f) : 0;
            mean = (float)level * step;
            const int e = log_scale(fmaxf(highest - mean, mean - lowest));
            s.mean[number] = mean, s.factor[number] = inverse_scale(e) * gain;
            if (writes) {
                block.statistics[number] = (u8)level, block.statistics[DIM + number] = (u8)e;
            }
        }
        if (writes) {
            u8* rest = block.statistics + 2 * DIM;
            const int i = threadIdx.x, bytes = key_statistics_bytes(DIM) - 2 * DIM;
            if (i < bytes) rest[i] = i == 0 ? (u8)step_bits : i == 1 ? (u8)(step_bits >> 8) : 0;
        }
        __syncthreads();
    }

    // Codes of tokens first .. first + count - 1, whole tiles, with the scales of values.
    template <class VectorOf>
    __device__ __forceinline__ void encode(int first, int count, VectorOf vector_of) {
        bool is_rotated = !IS_VALUE;  // by the same lanes
        for (; count > 0; first += TOKENS, count -= TOKENS, is_rotated = false) {
            const int now = min(count, TOKENS);
            if (is_rotated) {
                for (int t = warp; t < now; t += WARPS) {
                    float x[NUMBERS_A_LANE], *at = s.vectors + t * Scratch::LINE;
#pragma unroll
                    for (int j = 0; j < NUMBERS_A_LANE; j++) x[j] = lane + 32 * j < DIM ? at[lane + 32 * j] : 0.f;
                    normalise(first + t, x, at);
                }
            } else {
                for_rotated(first, now, vector_of, [&](int token, const float(&x)[NUMBERS_A_LANE]) {
                    normalise(token, x, s.vectors + (token - first) * Scratch::LINE);
                });
            }
            wait_copies<0>();
            __syncthreads();
            search(now);
            __syncthreads();
            write(first / TILE, now / TILE);
        }
    }

    // What lies between the codes and what follows them, where the codes are no multiple of 16 bytes.
    __device__ __forceinline__ void pad() {
        const int end = page_size / TILE * C::TILE_BYTES;
        if (end + (int)threadIdx.x < C::code_bytes(page_size)) block.codes[end + threadIdx.x] = 0;
    }

private:
    // use(token, rotated numbers of the lane) for tokens first .. first + count - 1, in a warp WARPS apart, in order.
    template <class VectorOf, class Use>
    __device__ __forceinline__ void for_rotated(int first, int count, VectorOf vector_of, Use use) {
        for (int begin = warp; begin < count; begin += WARPS * TOGETHER) {
            u16 numbers[TOGETHER][NUMBERS_A_LANE];
#pragma unroll
            for (int n = 0; n < TOGETHER; n++) {
                const u16* vector = vector_of(first + min(begin + n * WARPS, count - 1));
#pragma unroll
                for (int j = 0; j < NUMBERS_A_LANE; j++)
                    numbers[n][j] = lane + 32 * j < DIM ? vector[lane + 32 * j] : 0;
            }
#pragma unroll
            for (int n = 0; n < TOGETHER; n++) {
                if (begin + n * WARPS >= count) break;
                float x[NUMBERS_A_LANE];
#pragma unroll
                for (int j = 0; j < NUMBERS_A_LANE; j++) x[j] = float_of(numbers[n][j]) * equaliser[j];
                rotate<DIM>(x, lane);
                use(first + begin + n * WARPS, x);
            }
        }
    }

    __device__ __forceinline__ void normalise(int token, const float (&x)[NUMBERS_A_LANE], float* to) {
        float factor = 0.f;
        if (IS_VALUE) {
            float top = 0.f;
#pragma unroll
            for (int j = 0; j < NUMBERS_A_LANE; j++)
                if (lane + 32 * j < DIM) top = fmaxf(top, fabsf(x[j]));
            const int e = log_scale(__int_as_float(warp_max(__float_as_int(top))));
            factor = inverse_scale(e) * gain;
            if (lane == 0) block.statistics[token] = (u8)e;
        }
#pragma unroll
        for (int j = 0; j < NUMBERS_A_LANE; j++) {
            const int number = lane + 32 * j;
            if (number < DIM) to[number] = IS_VALUE ? x[j] * factor : (x[j] - s.mean[number]) * s.factor[number];
        }
    }

    // Each warp takes subspaces in turn, COUNT at a time, each lane two tokens of them.
    __device__ __forceinline__ void search(int tokens) {
        constexpr int SUB = C::NUMBERS,
                      MOST = SUB <= 2   ? 4
                             : SUB <= 4 ? 4
                             : SUB <= 8 ? 2
                                        : 1,
                      SHARE = (C::M + WARPS - 1) / WARPS;
        constexpr int COUNT = SHARE < MOST ? SHARE : MOST;
        for (int m = warp; m < C::M; m += WARPS * COUNT) {
            if (tokens > 32)
                search_some<COUNT, 2>(m, tokens);
            else
                search_some<COUNT, 1>(m, tokens);
        }
    }

    // Of subspaces m, m + WARPS, ...: lane's tokens lane + 32 t.
    template <int COUNT, int EACH>
    __device__ __forceinline__ void search_some(int m, int tokens) {
        constexpr int SUB = C::NUMBERS;
        float v[COUNT * EACH][SUB];
        int code[COUNT * EACH];
#pragma unroll
        for (int j = 0; j < COUNT * EACH; j++) {
            const int subspace = min(m + j / EACH * WARPS, C::M - 1), token = min(lane + 32 * (j % EACH), tokens - 1);
#pragma unroll
            for (int i = 0; i < SUB; i++) v[j][i] = s.vectors[token * Scratch::LINE + subspace * SUB + i];
        }
        if constexpr (has_cells<C>())
            nearest_by_cells<COUNT * EACH, C::CENTROIDS>(s.cells, s.table, s.halves, v, code);
        else
            nearest<COUNT * EACH, SUB, C::CENTROIDS>(s.table, s.halves, v, code);
#pragma unroll
        for (int j = 0; j < COUNT * EACH; j++) {
            const int subspace = m + j / EACH * WARPS, token = lane + 32 * (j % EACH);
            if (subspace < C::M && token < tokens)
                s.codes[token / TILE * TILE * C::M + C::place(IS_VALUE, token % TILE, subspace)] = (u8)code[j];
        }
    }

    // `bits` bits of a tile's stream of codes, from bit `first` on.
    __device__ __forceinline__ static u32 stream(const u8* codes, int first, int bits) {
        const u8* code = codes + first / C::BITS;
        u32 x = *code >> first % C::BITS;
        for (int filled = C::BITS - first % C::BITS; filled < bits; filled += C::BITS) x |= (u32) * ++code << filled;
        return x;
    }

    __device__ __forceinline__ void write(int first_tile, int tiles) {
        constexpr int UNIT = !C::DEALT ? 1 : C::LANE_HALVES % 2 ? 2 : 4;  // bytes that are written at a time
        constexpr int COUNT = C::TILE_BYTES / UNIT, A_LANE = C::DEALT ? COUNT / 32 : 1;
        for (int i = threadIdx.x; i < tiles * COUNT; i += THREADS) {
            const int tile = i / COUNT, at = i % COUNT;
            const u8* codes = s.codes + tile * TILE * C::M;
            u8* to = block.codes + (first_tile + tile) * C::TILE_BYTES;
            const u32 bits = stream(codes, at * UNIT * 8, UNIT * 8);
            if (UNIT == 4)
                ((u32*)to)[C::word_place(at / A_LANE, at % A_LANE)] = bits;
            else if (UNIT == 2)
                ((u16*)to)[C::half_place(at / A_LANE, at % A_LANE)] = (u16)bits;
            else
                to[at] = (u8)bits;
        }
    }
};
