// Decode attention straight from pages of codes, on tensor cores; one block serves one (row, KV head, split). Keys and
// values are rotated and normalised, so that one small codebook serves all of them: its codewords sit in shared memory,
// copied so often that every lane looks up in banks of its own, and a looked-up codeword is used as a matrix fragment
// just as it lies:
//   scores = K Q^T: the codeword's numbers are neighbours in the summed dimension;
//   out    = P V:   its two numbers are told apart by metadata, the weights being a sparse matrix.
// A warp takes a piece of a page at a time, some tiles of 16 tokens, and makes of the page's statistics what the piece
// needs: the query times the scales of the channels, the product of query and mean, the scales of the values, which
// join the weights. Sums are rotated as the pages are; only the finished output is turned back. kernels/NOTES.md has
// the measurements. Defines from the launch: PQ_DIM, PQ_KEY_M, PQ_KEY_BITS, PQ_VALUE_M, PQ_VALUE_BITS, PQ_WARPS,
// PQ_PIECE, PQ_HELD.
#include "attend_warp.cuh"

constexpr int WIDE = (DIM + 31) / 32 * 32;
// Whether a piece's last values wait for the first keys of the next. It pays where codes are long and registers are
// left: kernels/NOTES.md.
constexpr int CODE_WORDS = KeyTable::C::WORDS + ValueTable::C::WORDS;
constexpr bool OVERLAPS = CODE_WORDS >= 12 && (CODE_WORDS < 16 || WARPS == 8);
typedef Join<WIDE, DIM, WARPS, true> BlockJoin;

// What a block has in shared memory beside the tables, until it joins its warps.
struct Scratch {
    uint4 query[(KeyTable::STEPS + 1) / 2 * 32];  // rotated, of eight heads: pairs 0 and 1 of a step, then of the next
    float query_factors[8];
    uint2 barrier;
    int hides;  // whether the mask hides something of the block's coded tokens
    alignas(16) u16 key_centroids[KeyTable::C::CENTROIDS * KeyTable::C::NUMBERS];
    alignas(16) u16 value_centroids[ValueTable::C::CENTROIDS * ValueTable::C::NUMBERS];
    struct alignas(16) {
        PieceScales made;
        float sums[lanes_rotate() ? 4 : DIM];
    } warps[WARPS];
};
constexpr int SHARED_BYTES = TABLES + TABLE_ROWS * ROW_BYTES + (int)sizeof(Scratch);
static_assert(PQ_SHARED_BYTES >= SHARED_BYTES && PQ_SHARED_BYTES >= TABLES + BlockJoin::BYTES,
              "too little shared memory");

// Dynamic shared memory begins at byte 0 or 1024 of the window, by architecture: start at 1024 always.
__device__ __forceinline__ u8* tables_at(uint4* dynamic) {
    const u32 begin = shared_address(dynamic);
    if (begin > TABLES) __trap();
    return (u8*)dynamic + (TABLES - begin);
}

// A query head, as its warp holds it: lane i has numbers i + 32 j.
struct Query {
    static constexpr int N = (DIM + 31) / 32;
    float x[N];

    __device__ __forceinline__ void load(const u16* query, const float* equaliser, int lane) {
#pragma unroll
        for (int j = 0; j < N; j++)
            x[j] = lane + 32 * j < DIM ? float_of(query[lane + 32 * j]) * equaliser[lane + 32 * j] : 0.f;
    }

    // Rotates it into `scratch`, whose query is zero. It is multiplied by a power of two, so that its largest number is
    // between 4 and 8: times the scale of a channel, 2^12 at most, it is still an fp16 number, and there are digits to
    // spare below.
    __device__ __forceinline__ void rotate_into(const AttendArgs& a, Scratch& scratch, int head, int lane) {
        float top = 0.f;
        rotate<DIM>(x, lane);
#pragma unroll
        for (int j = 0; j < N; j++)
            if (lane + 32 * j < DIM) top = fmaxf(top, fabsf(x[j]));
        // The power of two below the largest magnitude: as integers, floats that are not negative are ordered as they
        // are.
        const int bits = warp_max(__float_as_int(top)) & 0x7f800000;
        const float power = bits ? __int_as_float(bits) * 0.25f : 1.f, inverse = 1.f / power;
        if (lane == 0) scratch.query_factors[head] = power * (PQ_SOFTCAP ? 1.f : a.scale_log2);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int number = lane + 32 * j;
            const KeyPair p(number);
            u16* to = (u16*)(scratch.query + (p.k >> 1) * 32 + head * 4 + p.c) + (p.k & 1) * 4 + p.j * 2;
            if (number < DIM) to[number % KeyTable::C::UNIT_NUMBERS % 2] = half_of(x[j] * inverse);
        }
    }
};
static_assert(WARPS >= 8, "a warp rotates each query head");

// The pieces of one warp: every WARPS-th of the block's share. Lane i knows where piece 32 n + i is; the pages of the
// next 32 pieces are asked for when these are taken up, so that no warp waits for the page table.
struct Pieces {
    const CacheArgs& cache;
    const int* pages;            // of the row
    int block_first, block_end;  // pieces of the block, by their number in the row
    int count, first;            // of this warp

    // coded: tokens of the row. Nothing is read yet.
    __device__ __forceinline__ Pieces(const AttendArgs& a, const Work& work, int coded, int warp)
        : cache(a.cache), pages(a.cache.page_table + (i64)work.batch_row * a.cache.table_width) {
        const int total = (u32)coded / (TILE * PIECE), size = divide(total + a.splits - 1, a.splits_inverse);
        block_first = min(work.split * size, total), block_end = min(block_first + size, total);
        first = block_first + warp;
        count = block_end > first ? (block_end - first + WARPS - 1) / WARPS : 0;
    }

    __device__ __forceinline__ void start(int lane) {
        upcoming = first + lane * WARPS;
        upcoming_page = page_of(upcoming);
        cursor = 32;
    }

    // Asks for the first piece into L2. What the kernel before may yet write - a count, a page's id, codes - is a hint
    // here.
    __device__ __forceinline__ void prefetch(const Layer& layer, int kv_head, int lane) const {
        typedef KeyTable::C Keys;
        typedef ValueTable::C Values;
        if (count == 0) return;
        const int page_number = min(page_at(first), cache.table_width - 1),
                  page = max(load_shared_level(pages + page_number), 0);
        const int tile = (first - page_number * (cache.page_size / TILE / PIECE)) * PIECE;
        const auto keys = Block<const u8>::of<Keys>(layer.pages[0] + page * cache.page_stride, cache.page_size,
                                                    cache.kv_heads, kv_head, false);
        const auto values = Block<const u8>::of<Values>(layer.pages[1] + page * cache.page_stride, cache.page_size,
                                                        cache.kv_heads, kv_head, true);
        for (int line = lane * 128; line < PIECE * Keys::TILE_BYTES; line += 32 * 128)
            prefetch_line(keys.codes + tile * Keys::TILE_BYTES + line);
        for (int line = lane * 128; line < PIECE * Values::TILE_BYTES; line += 32 * 128)
            prefetch_line(values.codes + tile * Values::TILE_BYTES + line);
        if (lane * 128 < key_statistics_bytes(DIM)) prefetch_line(keys.statistics + lane * 128);
        if (lane == 31) prefetch_line(values.statistics + tile * TILE);
    }

    // The page of the next piece, and its first tile there. Beyond the last piece they are any page's, and unused.
    __device__ __forceinline__ void next(u32& at_page, u32& at_tile) {
        if (cursor == 32) {
            page = max(upcoming_page, 0);
            tile = (upcoming - page_at(upcoming) * (cache.page_size / TILE / PIECE)) * PIECE;
            upcoming += 32 * WARPS, upcoming_page = page_of(upcoming), cursor = 0;
        }
        at_page = __shfl_sync(~0u, page, cursor), at_tile = __shfl_sync(~0u, tile, cursor);
        cursor++;
    }

private:
    int cursor, upcoming, upcoming_page;
    u32 page, tile;

    __device__ __forceinline__ int page_at(int piece) const { return divide(piece, cache.pieces_per_page_inverse); }
    __device__ __forceinline__ int page_of(int piece) const {
        return pages[min(page_at(piece), cache.table_width - 1)];
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ AttendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    typedef KeyTable::C Keys;
    typedef ValueTable::C Values;
    u8* tables = tables_at(dynamic);
    Scratch& scratch = *(Scratch*)(tables + TABLE_ROWS * ROW_BYTES);
    const CacheArgs& cache = a.cache;
    const Layer& layer = *cache.layer;
    const int lane = thread_number() & 31, warp = thread_number() >> 5;
    const Work work(a);
    auto& mine = scratch.warps[warp];
    const u32 barrier = shared_address(&scratch.barrier);
    let_next_start();
    // Nothing here is written by the kernel before.
    copy_centroids<Keys>(scratch.key_centroids, layer.centroids[0]);
    copy_centroids<Values>(scratch.value_centroids, layer.centroids[1]);
    commit_copies();
    for (int i = threadIdx.x; i < (int)(sizeof(scratch.query) / 16); i += THREADS) scratch.query[i] = uint4{0, 0, 0, 0};
    if (threadIdx.x < 8) scratch.query_factors[threadIdx.x] = 0.f;
    if (threadIdx.x == 0) barrier_init(barrier, THREADS), scratch.hides = 0;
    if (KeyTable::WIDTH != Keys::UNIT_NUMBERS ||
        Keys::UNITS * KeyTable::PAIRS % 8)  // pairs that no channel is written to
        for (int i = lane; i < (int)(sizeof(mine.made.keys) / 16); i += 32) mine.made.keys[i] = uint4{0, 0, 0, 0};
    // The last warps, which have the fewest pieces, begin with the window; its tiles go round over the splits.
    int slot = (work.split + (WARPS - 1 - warp) * a.splits) * TILE;
    const int num_slots = cache.sink_tokens + cache.window_slots;
    const u16 *window_keys, *window_values;
    auto find_window = [&](bool is_hint) {
        const i64 at = (i64)cache.window_block(work.batch_row, work.kv_head, work.block_row, is_hint) * num_slots * DIM;
        window_keys = layer.window[0] + at, window_values = layer.window[1] + at;
    };
    find_window(true);
    if (slot < num_slots) {
        for (int line = lane * 64; line < min(TILE, num_slots - slot) * DIM; line += 32 * 64) {
            prefetch_line(window_keys + slot * DIM + line);
            prefetch_line(window_values + slot * DIM + line);
        }
    }
    Pieces(a, work, load_shared_level(cache.counts + 2 * work.batch_row + 1), warp).prefetch(layer, work.kv_head, lane);
    wait_copies<0>();
    __syncthreads();
    fill_table<KeyTable>(tables, 0, scratch.key_centroids);
    fill_table<ValueTable>(tables, 1, scratch.value_centroids);
    wait_for_earlier();

    const u16* queries = a.query + ((i64)work.block_row * a.group + work.first_head) * DIM;
    Query query;
    if (warp < work.num_heads) query.load(queries + warp * DIM, layer.equaliser + work.kv_head * DIM, lane);
    const Row row(cache, work.batch_row);
    if (PQ_SLOTS) find_window(false);
    Pieces pieces(a, work, row.coded, warp);
    pieces.start(lane);
    Block<const u8> next_keys, next_values;  // where the next piece is; codes from its first tile on
    Statistics statistics;                   // of it
    auto take_next = [&]() {
        u32 page, tile;
        pieces.next(page, tile);
        const i64 at = (i64)page * cache.page_stride;
        next_keys =
            Block<const u8>::of<Keys>(layer.pages[0] + at, cache.page_size, cache.kv_heads, work.kv_head, false);
        next_values =
            Block<const u8>::of<Values>(layer.pages[1] + at, cache.page_size, cache.kv_heads, work.kv_head, true);
        next_keys.codes += tile * Keys::TILE_BYTES, next_values.codes += tile * Values::TILE_BYTES;
        statistics.ask(next_keys.statistics, next_values.statistics + tile * TILE, lane);
    };
    LaneCodes<KeyTable, false> keys[HELD];
    LaneCodes<ValueTable, true> values[HELD];
    if (pieces.count > 0) {
        take_next();
#pragma unroll
        for (int t = 0; t < HELD; t++) {
            keys[t].ask(next_keys.codes + t * Keys::TILE_BYTES, lane, true);
            values[t].ask(next_values.codes + t * Values::TILE_BYTES, lane, true);
        }
    }
    if (warp < work.num_heads) query.rotate_into(a, scratch, warp, lane);
    const int column = (PQ_MASK ? a.starts[work.batch_row] : 0) + cache.sink_tokens;
    if (PQ_MASK) {
        const int begin = column + pieces.block_first * PIECE * TILE, end = column + pieces.block_end * PIECE * TILE;
        if (!mask_is_silent<THREADS>(a, work.batch_row, begin, end)) scratch.hides = 1;
    }
    barrier_arrive(barrier);

    // The window needs neither tables nor what other warps rotate.
    Attention attention(a, lane);
    const int ring_first = row.ring_first();
    if (slot < row.used_slots(ring_first)) {
        const u16* head = queries + min(lane >> 2, work.num_heads - 1) * DIM;
        do {
            attention.window_tile(row, ring_first, slot, head, window_keys, window_values);
            slot += WARPS * a.splits * TILE;
        } while (slot < row.used_slots(ring_first));
        attention.rotate_sums(mine.sums);
    }
    barrier_wait(barrier);

    // Values of a tile are added while the keys of the next one are scored: look-ups and products of both interleave in
    // one basic block. Codes are asked for as soon as their registers are free, HELD tiles ahead.
    auto attend_pieces = [&](const bool masked) {       // inlined for each of the two
        int at = column + pieces.first * PIECE * TILE;  // column of the piece's first token
        const u8 *key, *value;                          // the piece's first codes
        bool more;                                      // whether there is a next one
        auto start = [&](int left) {
            key = next_keys.codes, value = next_values.codes, more = left > 1;
            attention.start_piece(statistics, mine.made, scratch.query, scratch.query_factors);
            if (more) take_next();
        };
        auto score = [&](int t) {
            const int ahead = t + HELD;
            attention.score(keys[t % HELD]);
            if (ahead < PIECE)
                keys[t % HELD].ask(key + ahead * Keys::TILE_BYTES, lane, true);
            else
                keys[t % HELD].ask(next_keys.codes + (ahead - PIECE) * Keys::TILE_BYTES, lane, more);
        };
        // from: where the tile to come is.
        auto add_values = [&](int t, const u8* from, bool yes) {
            attention.add_values(values[t % HELD]);
            values[t % HELD].ask(from, lane, yes);
        };
        auto weigh = [&](int t) {
            float low = 0.f, high = 0.f;
            if (masked) {
                const int token = at + t * TILE + (lane >> 2);
                low = mask_bias(a, work.batch_row, token), high = mask_bias(a, work.batch_row, token + 8);
            }
            attention.weigh(mine.made.values + t * 8, low, high);
        };
        auto score_and_add = [&]() {  // all tiles' values but the last one's, which are still to be added
#pragma unroll
            for (int t = 0; t + 1 < PIECE; t++) {
                const int ahead = t + HELD;
                score(t + 1);
                if (ahead < PIECE)
                    add_values(t, value + ahead * Values::TILE_BYTES, true);
                else
                    add_values(t, next_values.codes + (ahead - PIECE) * Values::TILE_BYTES, more);
                weigh(t + 1);
            }
        };
        if (!OVERLAPS) {
            for (int left = pieces.count; left > 0; left--) {
                start(left);
                score(0);
                weigh(0);
                score_and_add();
                add_values(PIECE - 1, next_values.codes + (HELD - 1) * Values::TILE_BYTES, more);
                at += WARPS * PIECE * TILE;
            }
        } else if (pieces.count > 0) {
            start(pieces.count);
            score(0);
            weigh(0);
            for (int left = pieces.count;; left--) {
                score_and_add();
                if (left == 1) break;
                start(left - 1);
                at += WARPS * PIECE * TILE;
                score(0);
                add_values(PIECE - 1, value + (HELD - 1) * Values::TILE_BYTES, true);  // of the piece before
                weigh(0);
            }
            attention.add_values(values[(PIECE - 1) % HELD]);
        }
    };
    if (PQ_MASK && scratch.hides)
        attend_pieces(true);
    else
        attend_pieces(false);

    const float reference = attention.of_row(attention.reference);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int m = 4; m < 32; m *= 2) attention.weight_sum[h] += __shfl_xor_sync(~0u, attention.weight_sum[h], m);
    const float weight_sum = attention.of_row(attention.weight_sum);
    const float unit = exp2_fast((float)(attention.value_zero - LOG_ZERO) * (1.f / LOG_STEPS));
    BlockJoin(a, tables).run(reference, weight_sum, [&](float* to, float f) { attention.store_sums(to, f * unit); });
}
