// One warp's part of tuned decode attention: table addresses, fragments, scores, weighted values, joining the warps.
// Knows nothing of pages; attend_tuned.cuh feeds it and explains the idea.
#pragma once
#include "softmax.cuh"

#ifndef PQ_KEY_COPIES
#define PQ_KEY_COPIES 2  // copies of the key table, 16 banks apart; 1 where shared memory is small (two-way conflicts)
#endif

#ifndef PQ_AHEAD
// How many tiles ahead a warp asks for codes into L2. With more heads that costs more than it brings.
#define PQ_AHEAD (PQ_HEADS == 2 ? 2 : 0)
#endif

constexpr int WARPS = 16, THREADS = WARPS * 32;

// DIM: numbers of a head. UNITS of WIDTH numbers each are looked up by BITS bits. Where UNITS * WIDTH is 2 * DIM, a
// unit is one number and its table entry is padded with a zero.
template <int DIM_, int UNITS_, int WIDTH_, int BITS_>
struct Shape {
    static constexpr int DIM = DIM_, UNITS = UNITS_, WIDTH = WIDTH_, BITS = BITS_;
    static constexpr int WIDE = UNITS * WIDTH, PAD = WIDE / DIM;
    static constexpr int ROW_BYTES = 256, TABLE_BYTES = (1 << BITS) * ROW_BYTES;
    static constexpr bool SECOND_COPY = UNITS == 64 && PQ_KEY_COPIES == 2;
    static constexpr int COPY_OFFSET = TABLE_BYTES + 64;  // 64 bytes are 16 banks
    static constexpr int KEY_BYTES = SECOND_COPY ? 2 * TABLE_BYTES + 128 : TABLE_BYTES;
    static constexpr int CHUNKS = UNITS / 32, WORDS = BITS / 2;  // a lane's codes of a tile: CHUNKS times 16 codes
    static constexpr int TILE_BYTES = TILE * UNITS * BITS / 8;
    static constexpr int STEPS = WIDE / 16, SLOTS = UNITS / 8, HALVES = WIDTH / 2;
    static constexpr int MERGE_BYTES = WARPS * 8 * (WIDE + 2) * 4 + 64 * 4 + THREADS * 24;
    static constexpr int TABLES = KEY_BYTES + TABLE_BYTES + 128;
    static constexpr int BASE = 1024;  // where tables start in the shared window, see tables_at()
    static constexpr int SHARED_BYTES = BASE + (TABLES > MERGE_BYTES ? TABLES : MERGE_BYTES);
    static_assert((UNITS == 64 && WIDTH == 2) || UNITS == 32, "a table row is 64 pairs or less");
};

// What this block does; grid (splits, head blocks * batch, KV heads). Splits vary fastest and KV heads slowest: blocks
// that run together read the same tables.
struct Work {
    int split, part, batch_row, kv_head, block_row, first_head, num_heads;

    __device__ __forceinline__ explicit Work(const AttendArgs& a) : split(blockIdx.x), kv_head(blockIdx.z) {
        const bool two = a.group > 8;  // a block has rows for 8 heads
        part = two ? blockIdx.y & 1 : 0;
        batch_row = two ? blockIdx.y >> 1 : blockIdx.y;
        block_row = batch_row * a.cache.kv_heads + kv_head;
        first_head = part ? (a.group + 1) / 2 : 0;
        num_heads = two ? (part ? a.group / 2 : (a.group + 1) / 2) : a.group;
    }

    __device__ __forceinline__ int* ticket(const AttendArgs& a) const {
        return (int*)a.cache.desc[6] + a.cache.batch + block_row * 2 + part;
    }
};

// HEADS: query heads per KV head the rows have room for: 2, 4 or 8, so 8 / HEADS rotation classes.
template <class S, int HEADS>
struct Attention {
    static constexpr int CLASSES = 8 / HEADS, CLASS_MASK = CLASSES - 1;

    const AttendArgs& a;
    const int g, c;        // fragment coordinates: g = lane / 4, c = lane % 4
    const int head, turn;  // head and rotation class of score row g
    bool useful;           // this lane's tokens are of the row's class
    u32 query[S::STEPS / 2][4];
    u32 key_offsets[S::BITS == 8 ? (S::UNITS == 32 && S::WIDTH == 2 ? 4 : 2)
                                 : (S::UNITS == 32 && S::WIDTH == 2 ? 8 : 4)];
    u32 value_offsets[S::BITS == 8 ? 2 : 4];
    float score[2][2];  // [8-token group][token 2c, 2c + 1]
    float sums[S::STEPS][4];
    float reference, exponent, threshold, weight_sum;

    __device__ __forceinline__ Attention(const AttendArgs& a_, int lane)
        : a(a_), g(lane >> 2), c(lane & 3), head((lane >> 2) / CLASSES), turn((lane >> 2) & CLASS_MASK) {
        useful = (c & CLASS_MASK) == turn;
        reference = NOTHING;
        exponent = infinity();  // a useless lane keeps it: its weights are exp2(-inf) = 0 without a branch
        threshold = useful ? NOTHING : infinity();
        weight_sum = 0.f;
#pragma unroll
        for (int i = 0; i < S::STEPS; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
        set_offsets();
    }

    // ---- table addresses
    // Byte of a lane's key unit within a table row for step k & 3; what depends on k alone is added as a constant.
    __device__ __forceinline__ u32 key_offset(int k, int half, u32& upper) const {
        const int far = g >> 2;
        const int turned = k ^ (g & 3);
        upper = 0;
        if (S::WIDTH == 4) return 32 * turned + 8 * c;
        if (S::UNITS == 64) {
            if (S::SECOND_COPY) upper = far;
            return 16 * turned + 4 * c + (S::SECOND_COPY ? 64 * far : 0);
        }
        return 16 * turned + 4 * c + (far ? 192 - 64 * half : 64 * half);
    }

    __device__ __forceinline__ u32 value_offset(int s) const {
        const int turned = s ^ c;
        if (S::UNITS == 64) return 32 * turned + 4 * g;
        return (64 * (g >> 2) + 16 * turned + 4 * (g & 3)) * (S::WIDTH / 2);
    }

    __device__ __forceinline__ void set_offsets() {
        constexpr int ROWS = S::UNITS == 32 && S::WIDTH == 2 ? 2 : 1;
#pragma unroll
        for (int half = 0; half < ROWS; half++) {
            u32 off[4], upper = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) off[k] = key_offset(k, half, upper);
            if (S::BITS == 8) {
                key_offsets[half * 2] = off[0] | off[1] << 8 | upper << 16;
                key_offsets[half * 2 + 1] = off[2] | off[3] << 8 | upper << 16;
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) key_offsets[half * 4 + k] = off[k] + upper * S::TABLE_BYTES;
            }
        }
        u32 off[4];
#pragma unroll
        for (int k = 0; k < 4; k++) off[k] = value_offset(k);
        if (S::BITS == 8) {
            value_offsets[0] = off[0] | off[1] << 8;
            value_offsets[1] = off[2] | off[3] << 8;
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) value_offsets[k] = off[k];
        }
#pragma unroll
        for (u32& x : key_offsets) opaque(x);
#pragma unroll
        for (u32& x : value_offsets) opaque(x);
    }

    // code * 256 + offset of step k & 3. 8 bits: one byte permutation. 6 bits: shift and mask.
    template <int N>
    static __device__ __forceinline__ u32 address(const u32 (&words)[S::WORDS], int code, const u32 (&offsets)[N],
                                                  int at, int k) {
        if (S::BITS == 8)
            return pick_bytes(words[code >> 2], offsets[at * 2 + ((k & 3) >> 1)],
                              0x7600 | (code & 3) << 4 | (4 + (k & 1)));
        const int bit = code * 6, word = bit >> 5, shift = bit & 31;
        u32 x;
        if (shift < 8)
            x = words[word] << (8 - shift);
        else if (shift <= 26)
            x = words[word] >> (shift - 8);
        else
            x = shift_pair_right(words[word], words[word + 1 < S::WORDS ? word + 1 : word], shift - 8);
        return (x & 0x3f00) | offsets[at * 4 + (k & 3)];
    }

    struct Codes {
        u32 words[S::CHUNKS][S::WORDS];

        __device__ __forceinline__ void load(const u8* p) {  // p: this lane's first code of the tile
#pragma unroll
            for (int i = 0; i < S::CHUNKS; i++) {
                if (S::BITS == 8) {
                    const uint4 x = load_stream((const uint4*)p + i * 32);
                    words[i][0] = x.x, words[i][1] = x.y, words[i][2] = x.z, words[i][S::WORDS - 1] = x.w;
                } else {
#pragma unroll
                    for (int j = 0; j < S::WORDS; j++) words[i][j] = load_stream((const u32*)p + i * 32 * S::WORDS + j);
                }
            }
        }
    };

    // ---- fragments: [step][low or high half of the step] for keys, [token 2c, 2c + 1][slot][half codeword] for values
    typedef u32 KeyFragment[S::STEPS][2];
    typedef u32 ValueFragment[2][S::SLOTS][S::HALVES];

    static __device__ __forceinline__ void swap_if(bool yes, u32& x, u32& y) {
        const u32 t = yes ? y : x;
        y = yes ? x : y;
        x = t;
    }

    __device__ __forceinline__ void look_up_keys(const Codes& codes, int group, KeyFragment& f) const {
#pragma unroll
        for (int k = 0; k < S::STEPS; k++) {
            if (S::WIDTH == 4) {
                const uint2 x = load_shared_pair(S::BASE + 128 * (k >> 2) +
                                                 address(codes.words[0], group * 8 + k, key_offsets, 0, k));
                f[k][0] = x.x, f[k][1] = x.y;
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (S::UNITS == 64)
                        f[k][half] =
                            load_shared(S::BASE + 128 * half + 64 * (k >> 2) +
                                        address(codes.words[group % S::CHUNKS], half * 8 + k, key_offsets, 0, k));
                    else
                        f[k][half] = load_shared(
                            S::BASE + address(codes.words[0], group * 8 + half * 4 + k, key_offsets, half, k));
            }
        }
        if (CLASSES == 1) {  // no spare rows for the tokens' bit 1: put the steps back in order
            const bool yes = g & 2;
#pragma unroll
            for (int k = 0; k < S::STEPS; k++)
                if (!(k & 2)) {
                    swap_if(yes, f[k][0], f[k + 2][0]);
                    swap_if(yes, f[k][1], f[k + 2][1]);
                }
        }
    }

    __device__ __forceinline__ void look_up_values(const Codes& codes, int group, ValueFragment& f) const {
        constexpr u32 TABLE = S::BASE + S::KEY_BYTES;
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
#pragma unroll
            for (int s = 0; s < S::SLOTS; s++) {
                if (S::UNITS == 64) {
                    f[odd][s][0] =
                        load_shared(TABLE + 128 * (s >> 2) +
                                    address(codes.words[group % S::CHUNKS], odd * 8 + s, value_offsets, 0, s));
                } else {
                    const u32 at = TABLE + address(codes.words[0], group * 8 + odd * 4 + s, value_offsets, 0, s);
                    if (S::WIDTH == 2) {
                        f[odd][s][0] = load_shared(at);
                    } else {
                        const uint2 x = load_shared_pair(at);
                        f[odd][s][0] = x.x, f[odd][s][S::HALVES - 1] = x.y;
                    }
                }
            }
        // spare rows cover bit 0 of the class (two classes), both bits (four) or none
#pragma unroll
        for (int bit = 2; bit >= 1; bit--)
            if (CLASSES < 2 * bit) {
                const bool yes = c & bit;
#pragma unroll
                for (int odd = 0; odd < 2; odd++)
#pragma unroll
                    for (int s = 0; s < S::SLOTS; s++)
                        if (!(s & bit)) {
#pragma unroll
                            for (int h = 0; h < S::HALVES; h++) swap_if(yes, f[odd][s][h], f[odd][s + bit][h]);
                        }
            }
    }

    // ---- the exact window: the same fragments, read from the model's own numbers
    // Pair number `pair` of the table's wide rows; a padded pair is (number, 0).
    static __device__ __forceinline__ u32 load_pair(const u16* vector, int pair) {
        return S::PAD == 2 ? load_global(vector + pair) : load_global((const u32*)vector + pair);
    }

    __device__ __forceinline__ void load_window_keys(const u16* keys, int first_slot, int last_slot,
                                                     KeyFragment& f) const {
        const int turned = g & (CLASSES == 1 ? 1 : 3);
        const u16* key = keys + (i64)min(first_slot + g, last_slot) * S::DIM;
#pragma unroll
        for (int k = 0; k < S::STEPS; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) f[k][half] = load_pair(key, key_pair(k ^ turned, half));
    }

    __device__ __forceinline__ void load_window_values(const u16* values, int first_slot, int last_slot,
                                                       ValueFragment& f) const {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const u16* value = values + (i64)min(first_slot + 2 * c + odd, last_slot) * S::DIM;
#pragma unroll
            for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
                for (int h = 0; h < S::HALVES; h++)
                    f[odd][s][h] = load_pair(value, value_unit(s ^ (c & CLASS_MASK), g) * S::HALVES + h);
            keep_order();
        }
    }

    // Pair of numbers that lane column c feeds to a half of step k.
    __device__ __forceinline__ int key_pair(int k, int half) const {
        return S::WIDTH == 4 ? 2 * (4 * k + c) + half : S::UNITS / 2 * half + 4 * k + c;
    }

    static __device__ __forceinline__ int value_unit(int s, int column) {
        return S::UNITS == 64 ? 8 * s + column : 16 * (column >> 2) + 4 * s + (column & 3);
    }

    // ---- arithmetic
    __device__ __forceinline__ void load_query(const u16* heads, int num_heads) {
        const int row_turn = 2 * (turn & 1);
        const u16* vector = heads + (head < num_heads ? head : 0) * S::DIM;
        const u32 keep = head < num_heads ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < S::STEPS / 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                query[i][j] = halves_of(load_pair(vector, key_pair((2 * i + (j & 1)) ^ row_turn, j >> 1))) & keep;
    }

    // Rows g + 8 hold the odd steps, so tokens with an odd number find their rotation there: two accumulators, one Q.
    __device__ __forceinline__ void add_scores(int group, const KeyFragment& f) {
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < S::STEPS; k += 2) {
            multiply(even, query[k / 2], f[k][0], f[k][1]);
            multiply(odd, query[k / 2], f[k + 1][0], f[k + 1][1]);
        }
        score[group][0] = soft_cap(a, even[0] + odd[2]);
        score[group][1] = soft_cap(a, even[3] + odd[1]);
    }

    __device__ __forceinline__ void weights_of(int group, u32 (&p)[4]) {
        const float p0 = exp2_fast(fmaf(score[group][0], a.scale_log2, -exponent));
        const float p1 = exp2_fast(fmaf(score[group][1], a.scale_log2, -exponent));
        weight_sum += p0 + p1;
        p[0] = pack_halves(p0, 0.f), p[2] = pack_halves(p1, 0.f);
        p[1] = p[0] << 16, p[3] = p[2] << 16;
    }

    __device__ __forceinline__ void add_values(const u32 (&p)[4], const u32 (&f0)[S::SLOTS][S::HALVES],
                                               const u32 (&f1)[S::SLOTS][S::HALVES]) {
#pragma unroll
        for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
            for (int h = 0; h < S::HALVES; h++) multiply(sums[s * S::HALVES + h], p, f0[s][h], f1[s][h]);
    }

    __device__ __forceinline__ void score_tile(const Codes& codes) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            KeyFragment f;
            look_up_keys(codes, i, f);
            add_scores(i, f);
        }
    }

    __device__ __forceinline__ void value_tile(const Codes& codes) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 p[4];
            weights_of(i, p);
            ValueFragment f;
            look_up_values(codes, i, f);
            add_values(p, f[0], f[1]);
        }
    }

    // Moves the reference only when a score beats it by 2^8: weights stay below 256, far from fp16's 65504.
    __device__ __forceinline__ void rescale() {
        float top = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]));
        if (__any_sync(~0u, top > threshold)) {
            float x = useful ? top : -infinity();
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            const float now = fmaxf(reference, x * a.scale_log2), shrink = exp2_fast(reference - now);
            reference = now;
            weight_sum *= shrink;
            if (useful && now > NOTHING) {
                exponent = now;
                threshold = (now + 8.f) * a.inverse_scale;
            }
#pragma unroll
            for (int i = 0; i < S::STEPS; i++)
                sums[i][0] *= shrink, sums[i][1] *= shrink, sums[i][2] *= shrink, sums[i][3] *= shrink;
        }
    }

    // 16 slots of the exact window. Slots without a token may hold anything: their keys get no weight, and their
    // values, which might be NaN, are made zero.
    __device__ __forceinline__ void window_tile(const Row& row, int ring_first, int batch_row, int start,
                                                int first_slot, int last_slot, const u16* keys, const u16* values) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            KeyFragment f;
            load_window_keys(keys, first_slot + 8 * i, last_slot, f);
#pragma unroll
            for (int k = 0; k < S::STEPS; k++) f[k][0] = halves_of(f[k][0]), f[k][1] = halves_of(f[k][1]);
            add_scores(i, f);
            keep_order();
        }
        u32 held = 0;  // a bit for each of the lane's four slots
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int slot = first_slot + 8 * i + 2 * c + odd;
                if (PQ_MASK) score[i][odd] += mask_bias(a, batch_row, start + row.token_in(slot, ring_first));
                const bool holds = row.holds(slot, ring_first);
                held |= (u32)holds << (2 * i + odd);
                if (!holds) score[i][odd] = -infinity();
            }
        rescale();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 p[4];
            weights_of(i, p);
            ValueFragment f;
            load_window_values(values, first_slot + 8 * i, last_slot, f);
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const bool holds = held >> (2 * i + odd) & 1;
#pragma unroll
                for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
                    for (int h = 0; h < S::HALVES; h++) f[odd][s][h] = holds ? halves_of(f[odd][s][h]) : 0u;
            }
            add_values(p, f[0], f[1]);
            keep_order();
        }
    }

    // Lane i < 16 brought what the mask says of token i of the tile. Nearly always nothing: one vote.
    __device__ __forceinline__ void apply_mask(float bias) {
#if PQ_MASK
        if (__any_sync(~0u, bias != 0.f)) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) score[i][odd] += __shfl_sync(~0u, bias, 8 * i + 2 * c + odd);
        }
#endif
    }

    // Joins the warps of the block: floats (heads, WIDE) in shared memory, then to the output or to `partial`.
    __device__ __forceinline__ void finish(uint4* shared) {
        const Work work(a);
        const int lane = thread_number() & 31, warp = thread_number() >> 5, g = lane >> 2, c = lane & 3;
        const int head = g / CLASSES, turn = g & CLASS_MASK;
        float* all = (float*)shared;                    // (warp, row, WIDE)
        float* references = all + WARPS * 8 * S::WIDE;  // (warp, row)
        float* weights = references + WARPS * 8;
        float* tops = weights + WARPS * 8;  // (head)
        volatile int* flag = (volatile int*)(tops + 16);
        float4* scratch = (float4*)(tops + 64);
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 1);
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 2);
        __syncthreads();  // the tables are no longer needed
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
        float4* mine = (float4*)all + (warp * 8 + g) * (S::WIDE / 4);
#pragma unroll
        for (int s = 0; s < S::SLOTS; s++) {
            const int unit = value_unit(s ^ turn, 2 * c);  // this lane's columns: units `unit` and `unit + 1`
            if (S::WIDTH == 2) {
                const float (&x)[4] = sums[s];
                mine[unit / 2] = make_float4(x[0] * f, x[2] * f, x[1] * f, x[3] * f);
            } else {
                const float (&x)[4] = sums[s * S::HALVES];
                const float (&y)[4] = sums[s * S::HALVES + S::HALVES - 1];
                mine[unit] = make_float4(x[0] * f, x[2] * f, y[0] * f, y[2] * f);
                mine[unit + 1] = make_float4(x[1] * f, x[3] * f, y[1] * f, y[3] * f);
            }
        }
        if (c == 0) {
            weights[warp * 8 + g] = weight_sum * f;
            if (warp == 0 && turn == 0) tops[head] = top;
        }
        __syncthreads();
        const Parts<S::WIDE> parts(a, work.block_row);
        for (int i = threadIdx.x; i < work.num_heads * S::WIDE; i += THREADS) {
            const int h = i / S::WIDE, d = i % S::WIDE;  // a warp stays within one head
            float o = 0.f, w = 0.f;
#pragma unroll
            for (int j = lane; j < WARPS * CLASSES; j += 32)
                w += weights[j / CLASSES * 8 + h * CLASSES + (j & CLASS_MASK)];
#pragma unroll
            for (int j = 0; j < WARPS * CLASSES; j++)
                o += all[(j / CLASSES * 8 + h * CLASSES + (j & CLASS_MASK)) * S::WIDE + d];
#pragma unroll
            for (int m = 16; m; m >>= 1) w += __shfl_xor_sync(~0u, w, m);
            const int group_head = work.first_head + h;
            if (a.splits == 1) {
                const float scale = normalizer(a, work.kv_head * a.group + group_head, tops[h], w);
                if (d % S::PAD == 0)
                    a.out[((i64)work.block_row * a.group + group_head) * S::DIM + d / S::PAD] = element_of(o * scale);
            } else {
                const i64 part = (i64)work.split * a.group + group_head;
                store_shared_level(parts.sums + part * S::WIDE + d, o);
                if (d == 0) store_shared_level(parts.weights + part, make_float2(tops[h], w));
            }
        }
        if (a.splits == 1) return;
        if (arrive_last(work.ticket(a), a.splits, flag))
            merge_splits<S::WIDE, S::DIM, THREADS>(a, work.block_row, work.first_head, work.num_heads, scratch);
    }
};
