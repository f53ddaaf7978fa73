// Where things are: arguments, the window's slots, and the place of a code in its page. hf_pqcache/pages/layout.py says the
// same in Python; a test compares the two.
#pragma once
#include "device.cuh"

// What a kernel needs to know of one layer's storage and of the call. Filled by hf_pqcache/backends/cuda_backend.py.
struct CacheArgs {
    const i64* desc;        // of one layer: addresses of key pages, value pages, key book, value book (none for exact
                            // pages), window keys, window values and tickets; last the tokens that never leave the
                            // window, huge while the layer has no centroids it needs. It is not an argument, so that a
                            // captured graph outlives that change.
    int* counts;            // (batch, 2): tokens of each row, and how many of them are codes
    const int* page_table;  // (batch, table_width)
    int batch, kv_heads, table_width, page_size, sink_tokens;
    int window_slots;  // slots of the ring: the tokens that never leave it and a page, or more
    u32 tiles_per_page_inverse;
};

struct AttendArgs {
    CacheArgs cache;
    const int* starts;  // (batch): mask column of the row's first token
    const u16* query;   // (batch, kv_heads, group, head_dim)
    u16* out;           // (batch, kv_heads, group, value_dim)
    float* partial;     // (batch, kv_heads, splits, group, value_dim + 2), splits > 1
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
    u8* pages;          // (max_pages, kv_heads, bytes)
    const u16* centroids;
    const int* page_ids;     // (batch, pages_per_row)
    const int* first_token;  // (batch)
    i64 batch_stride, head_stride, token_stride;
    int batch, kv_heads, tokens, pages_per_row, page_size, is_value;
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
        return (int*)a.cache.desc[6] + a.cache.batch + block_row * 2 + part;
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

enum Order { NATURAL, UNITS_64, UNITS_32 };

// Tuned shapes read codes in units that are an index into one table row: one code, or two 4-bit codes as one byte.
__device__ constexpr Order order_of(int num_subspaces, int num_bits) {
    return (num_bits == 8 || num_bits == 6) ? (num_subspaces == 64   ? UNITS_64
                                               : num_subspaces == 32 ? UNITS_32
                                                                     : NATURAL)
           : num_bits == 4                  ? (num_subspaces == 128  ? UNITS_64
                                               : num_subspaces == 64 ? UNITS_32
                                                                     : NATURAL)
                                            : NATURAL;
}

template <int M, int BITS>
struct Places {
    static constexpr Order ORDER = order_of(M, BITS);
    static constexpr int SPLIT = BITS == 4 && ORDER != NATURAL ? 2 : 1;
    static constexpr int TILE_BYTES = TILE * M * BITS / 8;

    __device__ __forceinline__ static int key(int token, int subspace) {
        if (ORDER == NATURAL) return token * M + subspace;
        const int unit = subspace / SPLIT, rest = subspace % SPLIT, n = token & 7, c = unit & 3;
        if (ORDER == UNITS_64)
            return (((token >> 3) * 32 + n * 4 + c) * 16 + (unit >> 5) * 8 + ((unit >> 2 & 7) ^ (n & 3))) * SPLIT +
                   rest;
        return ((n * 4 + c) * 16 + (token >> 3) * 8 + ((unit >> 2) ^ (n & 3))) * SPLIT + rest;
    }

    __device__ __forceinline__ static int value(int token, int subspace) {
        if (ORDER == NATURAL) return token * M + subspace;
        const int unit = subspace / SPLIT, rest = subspace % SPLIT, c = token & 3, b = token >> 2 & 1;
        if (ORDER == UNITS_64)
            return (((token >> 3) * 32 + (unit & 7) * 4 + c) * 16 + b * 8 + ((unit >> 3) ^ c)) * SPLIT + rest;
        const int g = (unit >> 4) * 4 + (unit & 3);
        return ((g * 4 + c) * 16 + (token >> 3) * 8 + b * 4 + ((unit >> 2 & 3) ^ c)) * SPLIT + rest;
    }
};
