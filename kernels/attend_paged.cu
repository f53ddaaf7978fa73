// Decode attention over pages that hold the model's own numbers, for a paged cache that compresses nothing; limited by
// memory. One block serves one (row, KV head, split), eight query heads of it; its warps take tiles of tokens, straight
// from memory into matrix fragments in loads of 16 bytes:
//   scores = Q K^T: the summed dimension may come in any order, so a lane's 8 neighbouring numbers are two steps of it;
//   out    = P V:   a pair of numbers is told apart by putting a weight into the low or the high half of a zero pair.
// Defines from the launch: PQ_DIM, PQ_WARPS.
#include "softmax.cuh"

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32;
// A warp takes 8 * GROUPS tokens at a time: what a lane holds of them must leave registers for the sums.
constexpr int GROUPS = PQ_DIM <= 128 ? 2 : 1, TOKENS = 8 * GROUPS;
constexpr int KEY_LOADS = (PQ_DIM + 31) / 32, VALUE_LOADS = (PQ_DIM + 63) / 64;  // of 16 bytes, a lane and token
constexpr int WIDE = VALUE_LOADS * 64, SLOTS = VALUE_LOADS * 4;
typedef Join<WIDE, PQ_DIM, WARPS, false> BlockJoin;
static_assert(PQ_DIM % 8 == 0 && PQ_DIM <= 256, "rows of 16 bytes, and sums that fit into registers");

__device__ __forceinline__ uint4 nothing() { return uint4{0, 0, 0, 0}; }

// Eight numbers of a row, from `number` on; zeros beyond the row. Pages are read once and early: STREAM.
template <bool STREAM>
__device__ __forceinline__ uint4 load_numbers(const u16* row, int number) {
    const uint4* at = (const uint4*)(row + number);
    return number >= PQ_DIM ? nothing() : STREAM ? load_stream(at) : *at;
}

struct Exact {
    const AttendArgs& a;
    const int g, c;  // fragment coordinates: g = lane / 4, c = lane % 4; score row g is query head g
    u32 query[KEY_LOADS][4];
    float score[GROUPS][2];  // exponents of 2: [8 tokens][token 2c, 2c + 1]
    float sums[SLOTS][4];    // slot 4 j + s: pairs 32 j + 4 (2c) + s and 32 j + 4 (2c + 1) + s, low and high number
    float reference = NOTHING, weight_sum = 0.f;

    __device__ __forceinline__ Exact(const AttendArgs& a_, int lane) : a(a_), g(lane >> 2), c(lane & 3) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
    }

    // A lane's 16 bytes are two steps of the product. Rows 8 to 15 of Q hold the second step: one fragment serves both,
    // with the scores of the first step in the upper half of one accumulator, of the second in the lower half of
    // another.
    __device__ __forceinline__ void load_query(const u16* heads, int num_heads) {
#pragma unroll
        for (int j = 0; j < KEY_LOADS; j++) {
            const uint4 x = g < num_heads ? load_numbers<false>(heads + g * PQ_DIM, 32 * j + 8 * c) : nothing();
            query[j][0] = x.x, query[j][1] = x.z, query[j][2] = x.y, query[j][3] = x.w;
        }
    }

    struct Keys {
        uint4 x[GROUPS][KEY_LOADS];

        // row_of(i): row i + g of the tile.
        template <bool STREAM, class RowOf>
        __device__ __forceinline__ void load(int c, RowOf row_of) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int j = 0; j < KEY_LOADS; j++) x[i][j] = load_numbers<STREAM>(row_of(8 * i), 32 * j + 8 * c);
        }
    };

    struct Values {
        uint4 x[GROUPS][2][VALUE_LOADS];

        // row_of(i): row i + 2 c of the tile.
        template <bool STREAM, class RowOf>
        __device__ __forceinline__ void load(int g, RowOf row_of) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++)
#pragma unroll
                    for (int j = 0; j < VALUE_LOADS; j++)
                        x[i][odd][j] = load_numbers<STREAM>(row_of(8 * i + odd), 64 * j + 8 * g);
        }
    };

    __device__ __forceinline__ void score_tile(const Keys& keys) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            float one[4] = {0, 0, 0, 0}, two[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < KEY_LOADS; j++) {
                multiply_elements(one, query[j], keys.x[i][j].x, keys.x[i][j].y);
                multiply_elements(two, query[j], keys.x[i][j].z, keys.x[i][j].w);
            }
            score[i][0] = soft_cap(a, one[0] + two[2]) * a.scale_log2,
            score[i][1] = soft_cap(a, one[1] + two[3]) * a.scale_log2;
        }
    }

    // What the mask says of the tile's tokens, the first of which has this column, joins the scores.
    __device__ __forceinline__ void apply_mask(int batch_row, int column) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) score[i][odd] += mask_bias(a, batch_row, column + 8 * i + 2 * c + odd);
    }

    // Moves the reference only when a score beats it by 2^8.
    __device__ __forceinline__ void rescale() {
        float top = fmaxf(score[0][0], score[0][1]);
        if (GROUPS == 2) top = fmaxf(top, fmaxf(score[GROUPS - 1][0], score[GROUPS - 1][1]));
        if (__any_sync(~0u, top > reference + 8.f)) {
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float now = fmaxf(reference, top), shrink = exp2_fast(reference - now);
            reference = now;
            weight_sum *= shrink;
#pragma unroll
            for (int i = 0; i < SLOTS; i++)
                sums[i][0] *= shrink, sums[i][1] *= shrink, sums[i][2] *= shrink, sums[i][3] *= shrink;
        }
    }

    __device__ __forceinline__ void value_tile(const Values& values) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const float p0 = exp2_fast(score[i][0] - reference);
            const float p1 = exp2_fast(score[i][1] - reference);
            weight_sum += p0 + p1;
            const u32 p[4] = {element_of(p0), (u32)element_of(p0) << 16, element_of(p1), (u32)element_of(p1) << 16};
#pragma unroll
            for (int j = 0; j < VALUE_LOADS; j++) {
                const uint4 &even = values.x[i][0][j], &odd = values.x[i][1][j];
                multiply_elements(sums[4 * j], p, even.x, odd.x);
                multiply_elements(sums[4 * j + 1], p, even.y, odd.y);
                multiply_elements(sums[4 * j + 2], p, even.z, odd.z);
                multiply_elements(sums[4 * j + 3], p, even.w, odd.w);
            }
        }
    }

    // A tile of the window. Slots without a token may hold anything: their keys get no weight, and their values, which
    // might be NaN, are made zero.
    __device__ __forceinline__ void window_tile(const Row& row, int ring_first, int batch_row, int start, int first,
                                                const u16* window_keys, const u16* window_values) {
        const int last = row.slots() - 1;
        Keys keys;
        keys.load<false>(c, [&](int i) { return window_keys + (i64)min(first + g + i, last) * PQ_DIM; });
        score_tile(keys);
        bool holds[GROUPS][2];
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int slot = first + 8 * i + 2 * c + odd;
                if (PQ_MASK) score[i][odd] += mask_bias(a, batch_row, start + row.token_in(slot, ring_first));
                holds[i][odd] = row.holds(slot, ring_first);
                if (!holds[i][odd]) score[i][odd] = -infinity();
            }
        rescale();
        Values values;
        values.load<false>(g, [&](int i) { return window_values + (i64)min(first + 2 * c + i, last) * PQ_DIM; });
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
#pragma unroll
                for (int j = 0; j < VALUE_LOADS; j++)
                    if (!holds[i][odd]) values.x[i][odd][j] = nothing();
        value_tile(values);
    }

    __device__ __forceinline__ void finish(uint4* shared) {
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 1);
        weight_sum += __shfl_xor_sync(~0u, weight_sum, 2);
        BlockJoin(a, shared).run(reference, weight_sum, [&](float* row, float f) {
#pragma unroll
            for (int i = 0; i < SLOTS; i += 2) {
                const float (&x)[4] = sums[i];
                const float (&y)[4] = sums[i + 1];
                float4* to = (float4*)row + i / 4 * 16 + 4 * c + i % 4 / 2;
                to[0] = make_float4(x[0] * f, x[2] * f, y[0] * f, y[2] * f);
                to[2] = make_float4(x[1] * f, x[3] * f, y[1] * f, y[3] * f);
            }
        });
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ AttendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= BlockJoin::BYTES, "the launch gives too little shared memory");
    const CacheArgs& cache = a.cache;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Layer& layer = *cache.layer;
    const Work work(a);
    Exact exact(a, lane);
    const int g = exact.g, c = exact.c;
    let_next_start();
    wait_for_earlier();
    const Row row(cache, work.batch_row);
    const int window_block = cache.window_block(work.batch_row, work.kv_head, work.block_row);
    const int start = PQ_MASK ? a.starts[work.batch_row] : 0;
    exact.load_query(a.query + ((i64)work.block_row * a.group + work.first_head) * PQ_DIM, work.num_heads);

    // What this thread sees of the mask over the block's tiles.
    const Share<TOKENS> share(a, work.split, row.coded);
    const int begin = start + cache.sink_tokens + share.first * TOKENS;
    const bool is_silent =
        !PQ_MASK || mask_is_silent<THREADS>(a, work.batch_row, begin, start + cache.sink_tokens + share.end * TOKENS);

    const int ring_first = row.ring_first();
    const i64 window = (i64)window_block * row.slots() * PQ_DIM;
    const u16 *window_keys = layer.window[0] + window, *window_values = layer.window[1] + window;
    // The last warps, which have the fewest tiles, begin with the window; its tiles go round over the splits.
    for (int slot = (work.split + (WARPS - 1 - warp) * a.splits) * TOKENS; slot < row.used_slots(ring_first);
         slot += WARPS * a.splits * TOKENS)
        exact.window_tile(row, ring_first, work.batch_row, start, slot, window_keys, window_values);

    // Tiles go round over the warps. Lane i knows the page of tile 32 n + i of the warp; those of the next 32 tiles are
    // asked for when these are taken up, so that no warp ever waits for the page table.
    const int first = share.first + warp, tiles_per_page = cache.page_size / TOKENS;
    const int count = share.end > first ? (share.end - first + WARPS - 1) / WARPS : 0;
    auto page_at = [&](int tile) { return divide(tile * TOKENS / TILE, cache.tiles_per_page_inverse); };
    auto page_of = [&](int i) {
        const int* pages = cache.page_table + (i64)work.batch_row * cache.table_width;
        return pages[min(page_at(first + (i + lane) * WARPS), cache.table_width - 1)];
    };
    int upcoming = page_of(0), page = 0, token = 0;  // of lane i's tile: its page, and its first token there
    // Where a tile begins, in bytes from the page of id 0.
    auto next_tile = [&](int i) {
        if (i % 32 == 0) {
            const int tile = first + (i + lane) * WARPS;
            page = max(upcoming, 0), token = (tile - page_at(tile) * tiles_per_page) * TOKENS;
            upcoming = page_of(i + 32);
        }
        const int at_page = __shfl_sync(~0u, page, i & 31), at_token = __shfl_sync(~0u, token, i & 31);
        return at_page * cache.page_stride + (work.kv_head * cache.page_size + at_token) * (PQ_DIM * 2);
    };
    const u8* key_pages = layer.pages[0] + g * PQ_DIM * 2;
    const u8* value_pages = layer.pages[1] + 2 * c * PQ_DIM * 2;
    Exact::Keys keys;
    Exact::Values values;
    auto load_keys = [&](i64 at) {
        keys.load<true>(c, [&](int i) { return (const u16*)(key_pages + at) + i * PQ_DIM; });
    };
    auto load_values = [&](i64 at) {
        values.load<true>(g, [&](int i) { return (const u16*)(value_pages + at) + i * PQ_DIM; });
    };
    i64 at = 0;
    if (count > 0) {
        at = next_tile(0);
        load_keys(at);
        load_values(at);
    }
    const bool is_masked = PQ_MASK && !__syncthreads_and(is_silent);
    const int column = begin + warp * TOKENS;  // of the warp's first tile
    if (count > 0) {
        exact.score_tile(keys);
        if (is_masked) exact.apply_mask(work.batch_row, column);
        exact.rescale();
        at = next_tile(1);
        load_keys(at);
        // Numbers are asked for as soon as their registers are free. Beyond the last tile they are any page's, unused.
        for (int i = 1; i < count; i++) {
            const i64 next = next_tile(i + 1);
            exact.value_tile(values);
            load_values(at);
            exact.score_tile(keys);
            load_keys(next);
            at = next;
            if (is_masked) exact.apply_mask(work.batch_row, column + i * WARPS * TOKENS);
            exact.rescale();
        }
        exact.value_tile(values);
    }
    exact.finish(dynamic);
}
