// Where things are: arguments, the window's slots, and the place of a code in its page. hf_pqcache/pages/layout.py says
// the same in Python; a test compares the two.
#pragma once
#include "device.cuh"

// One layer's addresses, in device memory: not arguments, so that a captured graph outlives their change. hf_pqcache
// fills them. Side 0 is keys, side 1 values.
struct Layer {
    const u8* pages[2];       // the page of id 0
    const u16* centroids[2];  // fp16 (2^bits, numbers of a code): one codebook for all heads and subspaces; null for
                              // exact pages
    const float*
        equaliser;      // (kv_heads, head_dim): what keys are divided by before they are rotated, queries multiplied by
    u16* window[2];     // (windows, kv_heads, sink_tokens + window_slots, head_dim), the model's own numbers
    int* tickets;       // (batch + 2 * batch * kv_heads) of the largest launch, zero between launches
    i64 recent_tokens;  // tokens that never leave the window
    float gain[2];      // what coded numbers are multiplied by when they are encoded: the centroids are as much longer
    const u32* cells[2];  // see kernels/nearest.cuh; null for codes that are searched without
};

// What a kernel needs to know of one layer's storage and of the call.
struct CacheArgs {
    const Layer* layer;
    int* counts;            // (batch, 2): tokens of each row, and how many of them are codes
    const int* page_table;  // (batch, table_width): ids of pages
    const int* windows;     // (batch): the window that each row has; unused without PQ_SLOTS
    i64 page_stride;        // bytes from page id n to n + 1, of either side
    int batch, kv_heads, table_width, page_size, sink_tokens;
    int window_slots;  // slots of the ring: the tokens that never leave it and a page, or more
    u32 tiles_per_page_inverse, pieces_per_page_inverse;

    // Which (window, KV head) of Layer::window a (row, KV head) of the batch has: the same, `block_row`, unless rows
    // change their places from step to step: PQ_SLOTS, chosen by the launch. is_hint: before wait_for_earlier().
    __device__ __forceinline__ int window_block(int row, int kv_head, int block_row, bool is_hint = false) const {
#if PQ_SLOTS
        block_row = (is_hint ? load_shared_level(windows + row) : windows[row]) * kv_heads + kv_head;
#endif
        return block_row;
    }
};

struct AttendArgs {
    CacheArgs cache;
    const int* starts;  // (batch): mask column of the row's first token
    const u16* query;   // (batch, kv_heads, group, head_dim)
    u16* out;           // (batch, kv_heads, group, head_dim)
    float* partial;     // (batch, kv_heads, splits, group, floats of a part + 2), splits > 1
    const void* mask;   // (batch or 1, columns) bool or element
    const u16* sinks;   // (kv_heads * group) logits that join the denominator, or null
    i64 mask_row_stride, mask_column_stride;
    int mask_columns, group, splits;
    u32 splits_inverse;
    float scale_log2;       // score times this is the exponent of 2
    float inverse_scale;    // 1 / scale_log2
    float cap_in, cap_out;  // softcap: score becomes cap_out * tanh(cap_in * score)
};

struct AppendArgs {
    CacheArgs cache;
    const u16 *key, *value;  // (batch, kv_heads, head_dim)
    int* flags;
};

struct EncodeArgs {
    const u16* source;  // (batch, kv_heads, tokens, head_dim), last dim dense
    u8* pages;          // of this side: the page of id 0
    const u16* centroids;
    const u32* cells;                             // as in Layer
    const float* equaliser;                       // of keys
    const int* page_ids;                          // (batch, pages_per_row)
    const int* first_token;                       // (batch)
    i64 batch_stride, head_stride, token_stride;  // of the source, in numbers
    i64 page_stride;
    int batch, kv_heads, tokens, pages_per_row, page_size;
    float gain;
};

// A tile is 16 tokens. Its codes lie together: 16 * M places of num_bits bits.
constexpr int TILE = 16;

// n / d by ceil(2^32 / d), which is 0 for d = 1. Right while n * d < 2^32; a division by instructions is a chain of
// thirty.
__device__ __forceinline__ int divide(int n, u32 inverse) { return inverse ? (int)high_product((u32)n, inverse) : n; }

// What a row holds: the sinks, `coded` tokens in pages, `left` more in the ring (below 0 while sinks are missing).
// Written so that going over the window keeps one number of it alive, as attention has no registers to spare.
struct Row {
    const CacheArgs& a;
    int coded, left;

    __device__ __forceinline__ Row(const CacheArgs& a_, int row) : a(a_), coded(a_.counts[2 * row + 1]) {
        left = a.counts[2 * row] - a.sink_tokens - coded;
    }

    __device__ __forceinline__ int length() const { return a.sink_tokens + coded + left; }
    __device__ __forceinline__ int slots() const { return a.sink_tokens + a.window_slots; }

    // Ring slot of the oldest token that is not coded.
    __device__ __forceinline__ int ring_first() const { return coded % a.window_slots; }

    // Slots beyond this one hold nothing; some before it may not either.
    __device__ __forceinline__ int used_slots(int ring_first) const {
        return ring_first ? slots() : min(slots(), a.sink_tokens + left);
    }

    // Tokens from the ring's oldest to the one of this slot; below 0 for a sink.
    __device__ __forceinline__ int ahead_in(int slot, int ring_first) const {
        const int ring = slot - a.sink_tokens;
        return ring < 0 ? ring : ring - ring_first + (ring < ring_first ? a.window_slots : 0);
    }

    __device__ __forceinline__ bool holds(int slot, int ring_first) const {
        return slot < slots() && ahead_in(slot, ring_first) < (slot < a.sink_tokens ? min(left, 0) : left);
    }

    __device__ __forceinline__ int token_in(int slot, int ring_first) const {
        return a.sink_tokens + ahead_in(slot, ring_first) + (slot < a.sink_tokens ? 0 : coded);
    }
};

// What this block does; grid (splits, head blocks * batch, KV heads). Splits vary fastest and KV heads slowest: blocks
// that run together read the same tables.
struct Work {
    int split, part, batch_row, kv_head, block_row, first_head, num_heads;

    __device__ __forceinline__ explicit Work(const AttendArgs& a) : split(blockIdx.x), kv_head(blockIdx.z) {
        const bool two = a.group > 8;  // a block has rows for 8 heads
        const int y = block_number_y();
        part = two ? y & 1 : 0;
        batch_row = two ? y >> 1 : y;
        block_row = batch_row * a.cache.kv_heads + kv_head;
        first_head = part ? (a.group + 1) / 2 : 0;
        num_heads = two ? (part ? a.group / 2 : (a.group + 1) / 2) : a.group;
    }

    __device__ __forceinline__ int* ticket(const AttendArgs& a) const {
        return a.cache.layer->tickets + a.cache.batch + block_row * 2 + part;
    }
};

// The tiles, TOKENS tokens each, of a row with so many coded ones that a split takes: first to end - 1.
template <int TOKENS>
struct Share {
    int first, end;

    __device__ __forceinline__ Share(const AttendArgs& a, int split, int coded) {
        const int num_tiles = (u32)coded / TOKENS, size = divide(num_tiles + a.splits - 1, a.splits_inverse);
        first = split * size;
        end = min(first + size, num_tiles);
    }
};

// How one side of a page of `DIM` numbers a head holds its codes: M of BITS bits a token. A unit is what looks up one
// table row: two neighbouring codes of 4 bits as one byte, or one code.
template <int DIM_, int M_, int BITS_>
struct Codes {
    static constexpr int DIM = DIM_, M = M_, BITS = BITS_, NUMBERS = DIM / M, CENTROIDS = 1 << BITS;
    static constexpr int SPLIT = BITS == 4 && M % 2 == 0 ? 2 : 1;  // codes of a unit
    static constexpr int UNITS = M / SPLIT, UNIT_BITS = BITS * SPLIT, UNIT_NUMBERS = NUMBERS * SPLIT;
    static constexpr int TILE_BYTES = TILE * M * BITS / 8;
    // Dealt to the lanes of a warp: lane 4 g + c owns the units that it looks up, as FULL_WORDS words and perhaps a
    // half.
    static constexpr bool DEALT = UNITS % 8 == 0 && UNITS * UNIT_BITS % 32 == 0;
    static constexpr int LANE_UNITS = UNITS / 2, LANE_HALVES = UNITS * UNIT_BITS / 32;
    static constexpr int FULL_WORDS = LANE_HALVES / 2, WORDS = (LANE_HALVES + 1) / 2;
    static_assert(DIM % M == 0, "codes are of equally many numbers");

    // Which unit of its lane a (token of a tile, unit) is, and the lane.
    __device__ __forceinline__ static int key_lane(int token, int unit) { return (token & 7) * 4 + (unit & 3); }
    __device__ __forceinline__ static int key_number(int token, int unit) { return (unit >> 2) * 2 + (token >> 3); }
    __device__ __forceinline__ static int value_lane(int token, int unit) { return (unit & 7) * 4 + (token & 3); }
    __device__ __forceinline__ static int value_number(int token, int unit) { return (unit >> 3) * 4 + (token >> 2); }

    // Place of a code in its tile's stream of bits.
    __device__ __forceinline__ static int place(bool is_value, int token, int code) {
        if (!DEALT) return token * M + code;
        const int unit = code / SPLIT, lane = is_value ? value_lane(token, unit) : key_lane(token, unit);
        const int number = is_value ? value_number(token, unit) : key_number(token, unit);
        return (lane * LANE_UNITS + number) * SPLIT + code % SPLIT;
    }

    // Where a word of that stream lies in the tile: planes of 4 words a lane, then of 2, then of 1, for wide loads.
    __device__ __forceinline__ static int word_place(int lane, int word) {
        constexpr int WIDE = FULL_WORDS / 4 * 4;
        if (word < WIDE) return word / 4 * 128 + lane * 4 + word % 4;
        if (word < WIDE + (FULL_WORDS & 2)) return WIDE * 32 + lane * 2 + word - WIDE;
        return (WIDE + (FULL_WORDS & 2)) * 32 + lane;
    }
    // The same of half a word; one that is alone comes last.
    __device__ __forceinline__ static int half_place(int lane, int half) {
        return half / 2 < FULL_WORDS ? word_place(lane, half / 2) * 2 + half % 2 : FULL_WORDS * 64 + lane;
    }

    __device__ __forceinline__ static int code_bytes(int page_size) {
        return (page_size / TILE * TILE_BYTES + 15) & ~15;
    }
};

// A page holds the codes of all heads, then what they were normalised by. Keys: DIM means (int8), DIM scales
// (logarithmic), the means' step (fp16). Values: a logarithmic scale for each token.
__device__ constexpr int key_statistics_bytes(int dim) { return (2 * dim + 2 + 15) & ~15; }
// One head's part of a page.
template <class Byte>
struct Block {
    Byte *codes, *statistics;

    template <class C>
    static __device__ __forceinline__ Block of(Byte* page, int page_size, int kv_heads, int kv_head, bool is_value) {
        const int bytes = is_value ? page_size : key_statistics_bytes(C::DIM), code_bytes = C::code_bytes(page_size);
        return {page + kv_head * code_bytes, page + kv_heads * code_bytes + kv_head * bytes};
    }
};
// A logarithmic scale `e` stands for 2^((e - LOG_ZERO) / LOG_STEPS).
constexpr int LOG_ZERO = 160, LOG_STEPS = 8;
