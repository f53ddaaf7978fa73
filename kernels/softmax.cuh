// Partial softmax results and how they join: (sum of weights * values, reference exponent, sum of weights),
// flash-decoding style. All exponents are of 2.
#pragma once
#include "hadamard.cuh"
#include "page.cuh"

constexpr float NOTHING = -1e30f;  // reference of a part that saw no token; finite, so that differences stay numbers
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 1 / sum of weights, the learnt sink logit of GPT-OSS models included; 0 for a row without any token.
__device__ __forceinline__ float normalizer(const AttendArgs& a, int head, float reference, float sum) {
    if (!(sum > 0.f)) return 0.f;
    if (a.sinks) sum += exp2_fast(float_of(a.sinks[head]) * LOG2_E - reference);
    return 1.f / sum;
}

// What the mask adds to the exponent of a token; an HF additive mask says "no" with a huge negative.
__device__ __forceinline__ float mask_bias(const AttendArgs& a, int row, int column) {
#if PQ_MASK
    if (column >= a.mask_columns || column < 0) return 0.f;
    const i64 at = row * a.mask_row_stride + column * a.mask_column_stride;
#if PQ_MASK == 1
    return ((const u8*)a.mask)[at] ? 0.f : -infinity();
#else
    const float m = float_of(((const u16*)a.mask)[at]);
    return m < -30000.f ? -infinity() : m * LOG2_E;
#endif
#else
    return 0.f;
#endif
}

// Whether the mask adds nothing in columns first .. end - 1 of a row, as far as this thread looks: all threads of the
// block share the columns, 16 bytes at a time where they lie side by side. Generate's masks are such nearly always, and
// asking once is much cheaper than a load for every token: kernels/NOTES.md.
template <int THREADS>
__device__ __forceinline__ bool mask_is_silent(const AttendArgs& a, int row, int first, int end) {
    bool silent = true;
#if PQ_MASK
    end = min(end, a.mask_columns);
    int head = end;  // columns before this one, and from `tail` on, are asked for one by one
    int tail = end;
    if (a.mask_column_stride == 1) {
        constexpr int SIZE = PQ_MASK == 1 ? 1 : 2, WIDE = 16 / SIZE;
        const u8* mask = (const u8*)a.mask + row * a.mask_row_stride * SIZE;
        head = min(end, first + (int)(-(i64)(mask + (i64)first * SIZE) & 15) / SIZE);
        tail = head + (end - head) / WIDE * WIDE;
        for (int i = head + threadIdx.x * WIDE; i < tail; i += THREADS * WIDE) {
            const uint4 x = *(const uint4*)(mask + (i64)i * SIZE);
            // A bool is 1; anything else that is true says no here, and joins the scores one by one. -0 adds nothing.
            silent &=
                PQ_MASK == 1 ? (x.x & x.y & x.z & x.w) == 0x01010101u : ((x.x | x.y | x.z | x.w) & 0x7fff7fffu) == 0;
        }
    }
    for (int i = first + threadIdx.x; i < head; i += THREADS) silent &= mask_bias(a, row, i) == 0.f;
    for (int i = tail + threadIdx.x; i < end; i += THREADS) silent &= mask_bias(a, row, i) == 0.f;
#endif
    return silent;
}

__device__ __forceinline__ float soft_cap(const AttendArgs& a, float score) {
#if PQ_SOFTCAP
    // tanh by its definition: the hardware's tanh.approx is good to 2^-11 only, too little for a score of 50.
    return a.cap_out * (1.f - 2.f / (exp2_fast(2.f * LOG2_E * a.cap_in * score) + 1.f));
#else
    return score;
#endif
}

// Where the parts of one (batch row, KV head) live in `partial`.
template <int WIDE>
struct Parts {
    float* sums;
    float2* weights;  // (reference, sum of weights)

    __device__ __forceinline__ Parts(const AttendArgs& a, int block_row) {
        const i64 first = (i64)block_row * a.splits * a.group;
        const i64 all = (i64)a.cache.batch * a.cache.kv_heads * a.splits * a.group;
        sums = a.partial + first * WIDE;
        weights = (float2*)(a.partial + all * WIDE) + first;
    }
};

// True in every thread of the last of `count` blocks to arrive; the ticket is zero again afterwards.
__device__ __forceinline__ bool arrive_last(int* ticket, int count, volatile int* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const int last = take_ticket(ticket) == count - 1;
        if (last) *ticket = 0;
        *flag = last;
    }
    __syncthreads();
    return *flag;
}

// Joins the warps of a block, and the last block of a (row, KV head) joins the splits. A warp has eight rows of sums,
// one a query head: row lane / 4 is that of the lane. Rows are WIDE floats, a multiple of 32, the first DIM of them the
// output, ROTATED or not.
template <int WIDE, int DIM, int WARPS, bool ROTATED>
struct Join {
    static constexpr int THREADS = WARPS * 32, COLUMNS = WIDE / 4;
    static constexpr int LINE = WIDE + 16;  // floats from row to row: neighbouring rows in different banks
    static_assert(WIDE % 32 == 0 && DIM <= WIDE, "a warp adds within one row");

    // The shared memory of it; `scratch` last.
    float* all;         // (warp, row, LINE), later (row, WIDE)
    float* references;  // (warp, row)
    float* weights;     // (warp, row)
    float* tops;        // (row)
    volatile int* flag;
    float4* scratch;  // THREADS, and as many float2; or (row, WIDE) floats
    static constexpr int SCRATCH_BYTES = THREADS * 24 > 8 * WIDE * 4 ? THREADS * 24 : 8 * WIDE * 4;
    static constexpr int BYTES = WARPS * 8 * (LINE + 2) * 4 + 64 + SCRATCH_BYTES;

    const AttendArgs& a;
    const Work work;

    __device__ __forceinline__ Join(const AttendArgs& a_, void* shared) : a(a_), work(a_) {
        all = (float*)shared;
        references = all + WARPS * 8 * LINE;
        weights = references + WARPS * 8;
        tops = weights + WARPS * 8;
        flag = (volatile int*)(tops + 8);
        scratch = (float4*)(tops + 16);
    }

    // reference, weight_sum: of the lane's row. store(float* row, float factor): this lane's numbers, times the factor,
    // to the row.
    template <class Store>
    __device__ __forceinline__ void run(float reference, float weight_sum, Store store) {
        const int lane = thread_number() & 31, warp = thread_number() >> 5, g = lane >> 2, c = lane & 3;
        __syncthreads();  // what lies in shared memory is no longer needed
        if (c == 0) references[warp * 8 + g] = reference;
        __syncthreads();
        float top = NOTHING;
#pragma unroll
        for (int i = c; i < WARPS; i += 4) top = fmaxf(top, references[i * 8 + g]);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float f = exp2_fast(reference - top);
        if (g < work.num_heads) store(all + (warp * 8 + g) * LINE, f);
        if (c == 0) {
            weights[warp * 8 + g] = weight_sum * f;
            if (warp == 0) tops[g] = top;
        }
        __syncthreads();
        const Parts<WIDE> parts(a, work.block_row);
        // Four numbers a thread: code that runs once costs what its instructions take to come.
        for (int i = threadIdx.x; i < work.num_heads * COLUMNS; i += THREADS) {
            const int h = i / COLUMNS, d = i % COLUMNS * 4, head = work.first_head + h;
            float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
            float w = 0.f;
#pragma unroll
            for (int j = 0; j < WARPS; j++) {
                const float4 x = *(const float4*)(all + (j * 8 + h) * LINE + d);
                o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
                w += weights[j * 8 + h];
            }
            if (a.splits == 1) {
                put((float*)scratch, h, d, o, normalizer(a, work.kv_head * a.group + head, tops[h], w));
            } else {
                const i64 part = (i64)work.split * a.group + head;
                store_shared_level((float4*)(parts.sums + part * WIDE + d), o);
                if (d == 0) store_shared_level(parts.weights + part, make_float2(tops[h], w));
            }
        }
        if (a.splits == 1)
            turn_back((float*)scratch);
        else if (arrive_last(work.ticket(a), a.splits, flag))
            merge_splits();
    }

private:
    // Four finished numbers, times `scale`: out, or kept to be rotated.
    __device__ __forceinline__ void put(float* kept, int h, int d, float4 x, float scale) const {
        const float number[4] = {x.x * scale, x.y * scale, x.z * scale, x.w * scale};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (ROTATED)
                kept[h * WIDE + d + j] = number[j];
            else if (d + j < DIM)
                a.out[((i64)work.block_row * a.group + work.first_head + h) * DIM + d + j] = element_of(number[j]);
        }
    }

    // Rotates what was kept and writes it: a warp for each head.
    __device__ __forceinline__ void turn_back(const float* kept) const {
        if (!ROTATED) return;
        const int lane = thread_number() & 31;
        __syncthreads();
        for (int h = thread_number() >> 5; h < work.num_heads; h += WARPS) {
            constexpr int N = (DIM + 31) / 32;
            float x[N];
#pragma unroll
            for (int j = 0; j < N; j++) x[j] = kept[h * WIDE + lane + 32 * j];
            rotate<DIM>(x, lane);
            u16* out = a.out + ((i64)work.block_row * a.group + work.first_head + h) * DIM;
#pragma unroll
            for (int j = 0; j < N; j++)
                if (lane + 32 * j < DIM) out[lane + 32 * j] = element_of(x[j]);
        }
    }

    // The parts of the splits, a float4 a thread: teams of threads share the splits.
    __device__ __forceinline__ void merge_splits() const {
        constexpr int FLIGHT = 8;
        const Parts<WIDE> parts(a, work.block_row);
        float2* scratch_weights = (float2*)(scratch + THREADS);
        const int columns = work.num_heads * COLUMNS;
        int width = 32;
        while (width < columns && 2 * width <= THREADS) width *= 2;
        const int teams = THREADS / width, team = threadIdx.x / width;
        for (int base = 0; base < columns; base += width) {
            const int column = base + threadIdx.x % width, h = column / COLUMNS, head = work.first_head + h;
            const bool is_mine = column < columns && team < teams;
            float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
            float reference = NOTHING, sum = 0.f;
            if (is_mine) {
                const float4* p = (const float4*)(parts.sums + (i64)head * WIDE) + column % COLUMNS;
                for (int s = team; s < a.splits; s += FLIGHT * teams) {
                    float4 x[FLIGHT];
                    float2 w[FLIGHT];
                    float top = reference;
#pragma unroll
                    for (int j = 0; j < FLIGHT; j++) {
                        const int split = s + j * teams;
                        w[j] = make_float2(NOTHING, 0.f);
                        x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
                        if (split < a.splits) {
                            w[j] = load_shared_level(parts.weights + split * a.group + head);
                            x[j] = load_shared_level(p + (i64)split * a.group * COLUMNS);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < FLIGHT; j++) top = fmaxf(top, w[j].x);
                    const float shrink = exp2_fast(reference - top);
                    o = make_float4(o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink);
                    sum *= shrink;
                    reference = top;
#pragma unroll
                    for (int j = 0; j < FLIGHT; j++) {
                        const float f = exp2_fast(w[j].x - top);
                        o.x += f * x[j].x, o.y += f * x[j].y, o.z += f * x[j].z, o.w += f * x[j].w;
                        sum += f * w[j].y;
                    }
                }
            }
            if (teams > 1) {
                scratch[threadIdx.x] = o;
                scratch_weights[threadIdx.x] = make_float2(reference, sum);
                __syncthreads();
            }
            if (is_mine && team == 0) {
                for (int j = 1; j < teams; j++) {
                    const float4 x = scratch[j * width + threadIdx.x];
                    const float2 w = scratch_weights[j * width + threadIdx.x];
                    const float top = fmaxf(reference, w.x), f0 = exp2_fast(reference - top), f = exp2_fast(w.x - top);
                    reference = top;
                    o.x = o.x * f0 + f * x.x, o.y = o.y * f0 + f * x.y, o.z = o.z * f0 + f * x.z,
                    o.w = o.w * f0 + f * x.w;
                    sum = sum * f0 + f * w.y;
                }
                put(all, h, column % COLUMNS * 4, o, normalizer(a, work.kv_head * a.group + head, reference, sum));
            }
            if (teams > 1) __syncthreads();
        }
        turn_back(all);
    }
};
