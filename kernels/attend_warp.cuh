// One warp's part of tuned decode attention: table addresses, fragments, scores, weighted values, joining the warps.
// Knows nothing of pages; attend_tuned.cuh feeds it and explains the idea.
#pragma once
#include "softmax.cuh"

#ifndef PQ_KEY_COPIES
#define PQ_KEY_COPIES 2  // copies of the key table, 16 banks apart; 1 where shared memory is small (two-way conflicts)
#endif
#ifndef PQ_STAGED
#define PQ_STAGED 0  // 1: codes come by way of shared memory, see Codes
#endif

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32;

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
    static constexpr int MERGE_BYTES = join_bytes(WARPS, WIDE);
    static constexpr int TABLES = KEY_BYTES + TABLE_BYTES + 128;
    static constexpr int BASE = 1024;  // where tables start in the shared window, see tables_at()
    static constexpr int STAGES = BASE + (TABLES > MERGE_BYTES ? TABLES : MERGE_BYTES);
    static constexpr int STAGE_BYTES = PQ_STAGED ? 2 * TILE_BYTES : 0;  // of a warp: a tile's keys, then its values
    static constexpr int SHARED_BYTES = STAGES + WARPS * STAGE_BYTES;
    static_assert(!PQ_STAGED || BITS == 8, "a lane's codes are copied 16 bytes at a time");
    static_assert((UNITS == 64 && WIDTH == 2) || UNITS == 32, "a table row is 64 pairs or less");
};

// HEADS: query heads per KV head the rows have room for: 2, 4 or 8, so 8 / HEADS rotation classes.
template <class S, int HEADS>
struct Attention {
    static constexpr int CLASSES = 8 / HEADS, CLASS_MASK = CLASSES - 1;
    // With 8 heads no spare rows undo the rotation by bit 1 of a key's token. Turning the words of codes back costs 8
    // permutations a tile instead of 32 exchanges, and a two-way bank conflict.
    static constexpr bool TURN_WORDS = CLASSES == 1 && S::BITS == 8;

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
    float reference, exponent[CLASSES == 4 ? 2 : 1], threshold, weight_sum;

    __device__ __forceinline__ Attention(const AttendArgs& a_, int lane)
        : a(a_), g(lane >> 2), c(lane & 3), head((lane >> 2) / CLASSES), turn((lane >> 2) & CLASS_MASK) {
        useful = (c & CLASS_MASK & 1) == (turn & 1);
        reference = NOTHING;
        for (float& x : exponent) x = infinity();  // useless tokens keep it: their weights are exp2(-inf) = 0
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
        const int turned = k ^ (g & (TURN_WORDS ? 1 : 3));
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

    // A lane's codes of one side of a tile. They come straight into registers, asked for when the tile before has been looked
    // up. Staged, they come into shared memory of the lane's own, which is free for the next ones as soon as they have been read
    // from there: a load has the time of a tile, not of half a tile, and the registers are free meanwhile. That is paid with
    // shared-memory bandwidth, of which eight heads and short codes have none to spare (kernels/NOTES.md).
    struct Codes {
        u32 words[S::CHUNKS][S::WORDS];

        // p: this lane's first code of the tile; stage: its place in shared memory.
        __device__ __forceinline__ void ask(const u8* p, u32 stage) {
#pragma unroll
            for (int i = 0; i < S::CHUNKS; i++) {
                if (PQ_STAGED) {
                    copy_async(stage + i * 512, (const uint4*)p + i * 32);
                } else if (S::BITS == 8) {
                    set(i, load_stream((const uint4*)p + i * 32));
                } else {
#pragma unroll
                    for (int j = 0; j < S::WORDS; j++) words[i][j] = load_stream((const u32*)p + i * 32 * S::WORDS + j);
                }
            }
            if (PQ_STAGED) commit_copies();
        }

        // Waits for what was asked for before the other side's latest codes were.
        __device__ __forceinline__ void receive(u32 stage) {
            if (!PQ_STAGED) return;
            wait_copies<1>();
#pragma unroll
            for (int i = 0; i < S::CHUNKS; i++) set(i, load_copied(stage + i * 512));
        }

        // use() looks up the codes that were asked for; those at next() are asked for as early as may be.
        template <class Next, class Use>
        __device__ __forceinline__ void consume(Next next, u32 stage, Use use) {
            receive(stage);
            if (PQ_STAGED) ask(next(), stage);
            use();
            if (!PQ_STAGED) ask(next(), stage);
        }

    private:
        __device__ __forceinline__ void set(int i, uint4 x) {
            words[i][0] = x.x, words[i][1] = x.y, words[i][2] = x.z, words[i][S::WORDS - 1] = x.w;
        }
    };

    // ---- fragments: [step][low or high half of the step] for keys, [slot & 3][half codeword][token c, c + 4, c + 8,
    // c + 12] for values
    typedef u32 KeyFragment[S::STEPS][2];
    typedef u32 ValueFragment[4][S::HALVES][4];

    static __device__ __forceinline__ void swap_if(bool yes, u32& x, u32& y) {
        const u32 t = yes ? y : x;
        y = yes ? x : y;
        x = t;
    }

    __device__ __forceinline__ void look_up_keys(const Codes& given, int group, KeyFragment& f) const {
        Codes codes = given;
        if (TURN_WORDS) {
            const u32 selector = thread_number() & 8 ? 0x1032 : 0x3210;
#pragma unroll
            for (int i = 0; i < S::CHUNKS; i++)
#pragma unroll
                for (u32& word : codes.words[i]) word = pick_bytes(word, word, selector);
        }
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
        if (CLASSES == 1 && !TURN_WORDS) {  // no spare rows for the tokens' bit 1: put the steps back in order
            const bool yes = g & 2;
#pragma unroll
            for (int k = 0; k < S::STEPS; k++)
                if (!(k & 2)) {
                    swap_if(yes, f[k][0], f[k + 2][0]);
                    swap_if(yes, f[k][1], f[k + 2][1]);
                }
        }
    }

    // Slots s .. s + 3.
    __device__ __forceinline__ void look_up_values(const Codes& codes, int s, ValueFragment& f) const {
        constexpr u32 TABLE = S::BASE + S::KEY_BYTES;
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int group = i / 2, far = i % 2;
                if (S::UNITS == 64) {
                    f[k][0][i] = load_shared(TABLE + 128 * (s >> 2) + address(codes.words[group % S::CHUNKS],
                                                                              far * 8 + s + k, value_offsets, 0, k));
                } else {
                    const u32 at = TABLE + address(codes.words[0], group * 8 + far * 4 + k, value_offsets, 0, k);
                    if (S::WIDTH == 2) {
                        f[k][0][i] = load_shared(at);
                    } else {
                        const uint2 x = load_shared_pair(at);
                        f[k][0][i] = x.x, f[k][S::HALVES - 1][i] = x.y;
                    }
                }
            }
        // Spare rows cover bit 1 of the token (two classes), bits 1 and 0 (four) or none.
#pragma unroll
        for (int bit = 2; bit >= 1; bit--)
            if (CLASSES < (bit == 2 ? 2 : 4)) {
                const bool yes = c & bit;
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (!(k & bit)) {
#pragma unroll
                        for (int h = 0; h < S::HALVES; h++)
#pragma unroll
                            for (int i = 0; i < 4; i++) swap_if(yes, f[k][h][i], f[k + bit][h][i]);
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

    // Slots s .. s + 3 of tokens c + 4 i, zero where the token's bit of `held` is not set: it might be NaN.
    __device__ __forceinline__ void load_window_values(const u16* values, int first_slot, int last_slot, u32 held, int s,
                                                       ValueFragment& f) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u16* value = values + (i64)min(first_slot + c + 4 * i, last_slot) * S::DIM;
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int h = 0; h < S::HALVES; h++) {
                    const int unit = value_unit((s + k) ^ value_turn(c), g);
                    f[k][h][i] = load_pair(value, unit * S::HALVES + h);
                }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int h = 0; h < S::HALVES; h++) f[k][h][i] = held >> (c + 4 * i) & 1 ? halves_of(f[k][h][i]) : 0u;
    }

    // Pair of numbers that lane column c feeds to a half of step k.
    __device__ __forceinline__ int key_pair(int k, int half) const {
        return S::WIDTH == 4 ? 2 * (4 * k + c) + half : S::UNITS / 2 * half + 4 * k + c;
    }

    // How far the slots of a value lane's tokens - or of a row of that class - are rotated, as far as rows undo it.
    static __device__ __forceinline__ int value_turn(int lane_column) {
        return lane_column & (CLASSES == 4 ? 3 : CLASSES == 2 ? 2 : 0);
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

    // The weights as a sparse matrix: rows g and g + 8 have the same pair of each group.
    __device__ __forceinline__ void weights(u32 (&p)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float p0 = exp2_fast(fmaf(score[i][0], a.scale_log2, -exponent[0]));
            const float p1 = exp2_fast(fmaf(score[i][1], a.scale_log2, -exponent[CLASSES == 4 ? 1 : 0]));
            weight_sum += p0 + p1;
            p[2 * i] = pack_halves(p0, p1), p[2 * i + 1] = pack_halves_again(p0, p1);
        }
    }

    __device__ __forceinline__ void add_values(const u32 (&p)[4], int s, const ValueFragment& f) {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int h = 0; h < S::HALVES; h++) multiply_sparse(sums[(s + k) * S::HALVES + h], p, f[k][h]);
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
        u32 p[4];
        weights(p);
#pragma unroll
        for (int s = 0; s < S::SLOTS; s += 4) {
            ValueFragment f;
            look_up_values(codes, s, f);
            add_values(p, s, f);
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
                if (CLASSES < 4 || turn < 2) exponent[0] = now;
                if (CLASSES == 4 && turn >= 2) exponent[CLASSES == 4 ? 1 : 0] = now;
                threshold = (now + 8.f) * a.inverse_scale;
            }
#pragma unroll
            for (int i = 0; i < S::STEPS; i++)
                sums[i][0] *= shrink, sums[i][1] *= shrink, sums[i][2] *= shrink, sums[i][3] *= shrink;
        }
    }

    // 16 slots of the exact window. Slots without a token may hold anything: their keys get no weight, and their
    // values, which might be NaN, are made zero.
    __device__ __forceinline__ void window_tile(const Row& row, int ring_first, int first_slot, int last_slot,
                                                const u16* keys, const u16* values) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            KeyFragment f;
            load_window_keys(keys, first_slot + 8 * i, last_slot, f);
#pragma unroll
            for (int k = 0; k < S::STEPS; k++) f[k][0] = halves_of(f[k][0]), f[k][1] = halves_of(f[k][1]);
            add_scores(i, f);
            keep_order();
        }
        const int batch_row = PQ_MASK ? Work(a).batch_row : 0, start = PQ_MASK ? a.starts[batch_row] : 0;
        const u32 held = __ballot_sync(~0u, row.holds(first_slot + (thread_number() & (TILE - 1)), ring_first));
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int at = 8 * i + 2 * c + odd;
                if (PQ_MASK) score[i][odd] += mask_bias(a, batch_row, start + row.token_in(first_slot + at, ring_first));
                if (!(held >> at & 1)) score[i][odd] = -infinity();
            }
        rescale();
        u32 p[4];
        weights(p);
#pragma unroll
        for (int s = 0; s < S::SLOTS; s += 4) {
            ValueFragment f;
            load_window_values(values, first_slot, last_slot, held, s, f);
            add_values(p, s, f);
            keep_order();
        }
    }

    // Lane i < 16 brought what the mask says of token i of the tile. Nearly always nothing: one vote.
    __device__ __forceinline__ void apply_mask(float bias) {
        if (__any_sync(~0u, bias != 0.f)) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) score[i][odd] += __shfl_sync(~0u, bias, 8 * i + 2 * c + odd);
        }
    }

    __device__ __forceinline__ void finish(uint4* shared) {
        Join<S::WIDE, S::DIM, S::PAD, WARPS, CLASSES>::run(a, shared, reference, weight_sum, [&](float4* mine, float f) {
            const int lane = thread_number() & 31, turn = lane >> 2 & CLASS_MASK, c = lane & 3;
#pragma unroll
            for (int s = 0; s < S::SLOTS; s++) {
                // This lane's columns: units `unit` and `unit + 1`.
                const int unit = value_unit(s ^ value_turn(2 * (turn & 1) + (turn >> 1)), 2 * c);
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
        });
    }
};
