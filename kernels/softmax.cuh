// Partial softmax results and how they join: (sum of weights * values, reference exponent, sum of weights),
// flash-decoding style. All exponents are of 2.
#pragma once
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

// What the mask adds to the raw score of a token (before the scale); an HF additive mask says "no" with a huge
// negative.
__device__ __forceinline__ float mask_bias(const AttendArgs& a, int row, int column) {
#if PQ_MASK
    if (column >= a.mask_columns || column < 0) return 0.f;
    const i64 at = row * a.mask_row_stride + column * a.mask_column_stride;
#if PQ_MASK == 1
    return ((const u8*)a.mask)[at] ? 0.f : -infinity();
#else
    const float m = float_of(((const u16*)a.mask)[at]);
    return m < -30000.f ? -infinity() : m * LOG2_E * a.inverse_scale;
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
            silent &= PQ_MASK == 1 ? (x.x & x.y & x.z & x.w) == 0x01010101u
                                   : ((x.x | x.y | x.z | x.w) & 0x7fff7fffu) == 0;
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

// Where the parts of one (batch row, kv head) live in `partial`.
template <int DIM>
struct Parts {
    float* sums;
    float2* weights;  // (reference, sum of weights)

    __device__ __forceinline__ Parts(const AttendArgs& a, int block_row) {
        const i64 first = (i64)block_row * a.splits * a.group;
        const i64 all = (i64)a.cache.batch * a.cache.kv_heads * a.splits * a.group;
        sums = a.partial + first * DIM;
        weights = (float2*)(a.partial + all * DIM) + first;
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

// The last block of a (row, kv head) joins the parts of heads first_head .. first_head + heads - 1 and writes the
// output. DIM floats a part, of which every STEP-th is a number of the output, the first OUT of them. scratch: THREADS
// float4 and THREADS float2.
template <int DIM, int OUT, int STEP, int THREADS>
__device__ __forceinline__ void merge_splits(const AttendArgs& a, int block_row, int first_head, int heads,
                                             float4* scratch) {
    constexpr int FLIGHT = 8, COLUMNS = DIM / 4;
    const Parts<DIM> parts(a, block_row);
    float2* scratch_weights = (float2*)(scratch + THREADS);
    const int columns = heads * COLUMNS;
    int width = 32;
    while (width < columns && width < THREADS) width *= 2;
    const int teams = THREADS / width, team = threadIdx.x / width;
    for (int base = 0; base < columns; base += width) {
        const int column = base + threadIdx.x % width, head = first_head + column / COLUMNS;
        float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
        float reference = NOTHING, sum = 0.f;
        if (column < columns) {
            const float4* p = (const float4*)(parts.sums + (i64)head * DIM) + column % COLUMNS;
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
        if (column < columns && team == 0) {
            for (int j = 1; j < teams; j++) {
                const float4 x = scratch[j * width + threadIdx.x];
                const float2 w = scratch_weights[j * width + threadIdx.x];
                const float top = fmaxf(reference, w.x), f0 = exp2_fast(reference - top), f = exp2_fast(w.x - top);
                reference = top;
                o.x = o.x * f0 + f * x.x, o.y = o.y * f0 + f * x.y, o.z = o.z * f0 + f * x.z, o.w = o.w * f0 + f * x.w;
                sum = sum * f0 + f * w.y;
            }
            const int head_of_all = (block_row % a.cache.kv_heads) * a.group + head;
            const float scale = normalizer(a, head_of_all, reference, sum);
            const float value[4] = {o.x * scale, o.y * scale, o.z * scale, o.w * scale};
            u16* out = a.out + ((i64)block_row * a.group + head) * OUT;
#pragma unroll
            for (int j = 0; j < 4; j += STEP) {
                const int at = ((column % COLUMNS) * 4 + j) / STEP;
                if (at < OUT) out[at] = element_of(value[j]);
            }
        }
        if (teams > 1) __syncthreads();
    }
}

// Shared memory that Join takes.
__device__ constexpr int join_bytes(int warps, int wide) { return warps * 8 * (wide + 2) * 4 + 64 * 4 + warps * 32 * 24; }

// Joins the warps of a block, and the last block of a (row, KV head) joins the splits. A warp has eight rows of WIDE
// sums, CLASSES for each head: row lane / 4 is that of the lane, and the four lanes of a row hold parts of its sum of
// weights and columns of its sums. Every STEP-th of the WIDE columns is a number of the output, the first OUT of them.
template <int WIDE, int OUT, int STEP, int WARPS, int CLASSES>
struct Join {
    static constexpr int THREADS = WARPS * 32, CLASS_MASK = CLASSES - 1;

    // store(float4* row, float factor): this lane's columns, times the factor, to the row's floats.
    template <class Store>
    static __device__ __forceinline__ void run(const AttendArgs& a, uint4* shared, float reference, float weight_sum,
                                               Store store) {
        const Work work(a);
        const int lane = thread_number() & 31, warp = thread_number() >> 5, g = lane >> 2, c = lane & 3;
        const int head = g / CLASSES, turn = g & CLASS_MASK;
        float* all = (float*)shared;                 // (warp, row, WIDE)
        float* references = all + WARPS * 8 * WIDE;  // (warp, row)
        float* weights = references + WARPS * 8;
        float* tops = weights + WARPS * 8;  // (head)
        volatile int* flag = (volatile int*)(tops + 16);
        float4* scratch = (float4*)(tops + 64);
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 1);
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 2);
        __syncthreads();  // what lies in shared memory is no longer needed
        if (c == 0) references[warp * 8 + g] = reference;
        __syncthreads();
        float top = NOTHING;
#pragma unroll
        for (int i = c * CLASSES + turn; i < WARPS * CLASSES; i += 4 * CLASSES)
            top = fmaxf(top, references[i / CLASSES * 8 + head * CLASSES + (i & CLASS_MASK)]);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        if (CLASSES >= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        if (CLASSES >= 4) top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        const float f = exp2_fast(reference - top);
        store((float4*)all + (warp * 8 + g) * (WIDE / 4), f);
        if (c == 0) {
            weights[warp * 8 + g] = weight_sum * f;
            if (warp == 0 && turn == 0) tops[head] = top;
        }
        __syncthreads();
        const Parts<WIDE> parts(a, work.block_row);
        for (int i = threadIdx.x; i < work.num_heads * WIDE; i += THREADS) {
            const int h = i / WIDE, d = i % WIDE;  // a warp stays within one head
            float o = 0.f, w = 0.f;
#pragma unroll
            for (int j = lane; j < WARPS * CLASSES; j += 32)
                w += weights[j / CLASSES * 8 + h * CLASSES + (j & CLASS_MASK)];
#pragma unroll
            for (int j = 0; j < WARPS * CLASSES; j++)
                o += all[(j / CLASSES * 8 + h * CLASSES + (j & CLASS_MASK)) * WIDE + d];
#pragma unroll
            for (int m = 16; m; m >>= 1) w += __shfl_xor_sync(~0u, w, m);
            const int group_head = work.first_head + h;
            if (a.splits == 1) {
                const float scale = normalizer(a, work.kv_head * a.group + group_head, tops[h], w);
                if (d % STEP == 0 && d / STEP < OUT)
                    a.out[((i64)work.block_row * a.group + group_head) * OUT + d / STEP] = element_of(o * scale);
            } else {
                const i64 part = (i64)work.split * a.group + group_head;
                store_shared_level(parts.sums + part * WIDE + d, o);
                if (d == 0) store_shared_level(parts.weights + part, make_float2(tops[h], w));
            }
        }
        if (a.splits == 1) return;
        if (arrive_last(work.ticket(a), a.splits, flag))
            merge_splits<WIDE, OUT, STEP, THREADS>(a, work.block_row, work.first_head, work.num_heads, scratch);
    }
};
