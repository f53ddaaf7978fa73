// Decode attention straight from codes on tensor cores. One block serves one (row, KV head, split); its warps
// take tiles of 16 tokens. Both codebooks sit in shared memory as tables of 256-byte rows, one row a code, and a
// looked-up codeword is used as a matrix fragment just as it lies:
//   scores = Q K^T: the codeword's numbers are neighbours in the summed dimension;
//   out    = P V:   its two numbers are told apart by putting a weight into the low or the high half of a zero pair.
// Lanes that want the same unit of different tokens would hit one bank, so they ask in rotated order (the page layout
// is rotated with them). The rotation is undone for free where the matrix has spare rows: row (head, class) of Q is
// rotated like the tokens of that class, and only the lanes where the classes agree keep their score. kernels/NOTES.md
// has the measurements behind each choice.
#pragma once
#include "attend_warp.cuh"

// Shared addresses are built from codes by one byte permutation, so the tables' base must be a constant of the
// look-up's address field. Dynamic shared memory begins at byte 0 or 1024 of the window, by architecture: start at 1024
// always.
template <class S>
__device__ __forceinline__ uint4* tables_at(uint4* dynamic) {
    const u32 begin = shared_address(dynamic);
    if (begin > S::BASE) __trap();
    return (uint4*)((char*)dynamic + (S::BASE - begin));
}

// The code tables of one block. wait_keys(vote): true if every thread of the block says so; the keys are there.
template <class S>
struct Tables {
    uint4* shared;
    static constexpr u32 BARRIER = S::BASE + S::KEY_BYTES + S::TABLE_BYTES;

#if PQ_BULK_COPY
    __device__ __forceinline__ void request(const u8* keys, const u8* values) const {
        if (threadIdx.x == 0) {
            barrier_init(BARRIER);
            barrier_init(BARRIER + 8);
            barrier_expect(BARRIER, S::TABLE_BYTES * (1 + S::SECOND_COPY));
            barrier_expect(BARRIER + 8, S::TABLE_BYTES);
            copy_bulk(S::BASE, keys, S::TABLE_BYTES, BARRIER);
            if (S::SECOND_COPY) copy_bulk(S::BASE + S::COPY_OFFSET, keys, S::TABLE_BYTES, BARRIER);
            copy_bulk(S::BASE + S::KEY_BYTES, values, S::TABLE_BYTES, BARRIER + 8);
        }
        __syncthreads();
    }
    __device__ __forceinline__ bool wait_keys(bool vote) const {
        barrier_wait(BARRIER);
        return PQ_MASK ? __syncthreads_and(vote) : true;
    }
    __device__ __forceinline__ void wait_values() const { barrier_wait(BARRIER + 8); }
#else
    __device__ __forceinline__ void request(const u8* keys, const u8* values) const {
        for (int i = threadIdx.x; i < S::TABLE_BYTES / 16; i += THREADS) {
            const uint4 x = ((const uint4*)keys)[i];
            shared[i] = x;
            if (S::SECOND_COPY) shared[S::COPY_OFFSET / 16 + i] = x;
            shared[S::KEY_BYTES / 16 + i] = ((const uint4*)values)[i];
        }
    }
    __device__ __forceinline__ bool wait_keys(bool vote) const { return __syncthreads_and(vote); }
    __device__ __forceinline__ void wait_values() const {}
#endif
};

// Made anew: kept from the kernel's beginning, its numbers would not fit into the registers.
__device__ __forceinline__ Share<TILE> share_again(const AttendArgs& a) {
    const Work work(a);
    return Share<TILE>(a, work.split, load_fresh(a.cache.counts + 2 * work.batch_row + 1));
}

// The tiles of one warp: every WARPS-th of the block's share. Lane i knows the place of tile 32 n + i - skipped; the pages of
// the next 32 tiles are asked for when these are taken up, so that no warp ever waits for the page table.
struct Tiles {
    int count;
    u32 places;  // place: number of a tile in the pool of pages

    __device__ __forceinline__ Tiles(const AttendArgs& a, int skipped) {
        const Share<TILE> share = share_again(a);
        const int lane = thread_number() & 31, first = share.first + (thread_number() >> 5);
        count = share.end > first ? (share.end - first + WARPS - 1) / WARPS : 0;
        tile = first + (lane - skipped) * WARPS;
        page = page_of(a);
        renew(a, Work(a).kv_head);
    }

    // Takes up the 32 tiles whose pages have come. Beyond the last tile they are any pages, and unused.
    __device__ __forceinline__ void renew(const AttendArgs& a, int kv_head) {
        const CacheArgs& cache = a.cache;
        int tiles_per_page = cache.page_size;
        opaque(tiles_per_page);
        tiles_per_page /= TILE;
        const int in_page = tile - page_at(cache) * tiles_per_page;
        places = (u32)(max(page, 0) * cache.kv_heads + kv_head) * tiles_per_page + max(in_page, 0);
        tile += 32 * WARPS;
        page = page_of(a);
    }

private:
    int tile, page;  // of the 32 tiles to come, one a lane

    __device__ __forceinline__ int page_at(const CacheArgs& cache) const {
        return divide(max(tile, 0), cache.tiles_per_page_inverse);
    }
    __device__ __forceinline__ int page_of(const AttendArgs& a) const {
        const CacheArgs& cache = a.cache;
        int width = cache.table_width, group = a.group;
        opaque(width), opaque(group);
        const int batch_row = block_number_y() >> (int)(group > 8);
        return load_fresh(cache.page_table + (batch_row * width + min(page_at(cache), width - 1)));
    }
};

// Asks for the block's first codes into L2 while the launch before this one still runs: one warp for all. What that
// launch may yet write - a count, a page number, codes - is read here as a hint only.
template <class S>
__device__ __forceinline__ void prefetch_first_tiles(const AttendArgs& a, const Work& work) {
    const CacheArgs& cache = a.cache;
    const int lane = thread_number() & 31;
    const Share<TILE> share(a, work.split, load_shared_level(cache.counts + 2 * work.batch_row + 1));
    const int tile = share.first + lane, tiles_per_page = cache.page_size / TILE;
    if (tile >= share.end) return;
    const int page_at = min(divide(tile, cache.tiles_per_page_inverse), cache.table_width - 1);
    const int page = max(load_shared_level(cache.page_table + (i64)work.batch_row * cache.table_width + page_at), 0);
    const i64 place = (i64)(page * cache.kv_heads + work.kv_head) * tiles_per_page + tile - page_at * tiles_per_page;
    prefetch_bulk((const u8*)cache.desc[0] + place * S::TILE_BYTES, S::TILE_BYTES);
    prefetch_bulk((const u8*)cache.desc[1] + place * S::TILE_BYTES, S::TILE_BYTES);
}

template <class S, int HEADS>
__device__ __forceinline__ void attend_tuned(const AttendArgs& a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= S::SHARED_BYTES, "the launch gives too little shared memory");
    const CacheArgs& cache = a.cache;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Attention<S, HEADS> attention(a, lane);
    Tables<S> tables;
    tables.shared = tables_at<S>(dynamic);
    const Work work(a);
    bool is_silent = true;  // what this thread has seen of the mask over the block's coded tokens
    let_next_start();
    {
        const i64* desc = cache.desc;
        // The exact window needs no table: its tiles go round over the splits and fill the wait for the tables. The
        // last warps take them, which have the fewest coded tiles.
        const int num_slots = cache.sink_tokens + cache.window_slots;
        const i64 window = (i64)work.block_row * num_slots * S::DIM;
        const u16 *window_keys = (const u16*)desc[4] + window, *window_values = (const u16*)desc[5] + window;
        int slot = (work.split + (WARPS - 1 - warp) * a.splits) * TILE;
        tables.request((const u8*)desc[2] + (i64)work.kv_head * S::TABLE_BYTES,
                       (const u8*)desc[3] + (i64)work.kv_head * S::TABLE_BYTES);
        if (warp == WARPS / 2) prefetch_first_tiles<S>(a, work);
        wait_for_earlier();
        if (slot < num_slots) {
            const int line = lane * 64;  // 128 bytes: a lane each for 16 slots of 128 numbers
            if (line < min(TILE, num_slots - slot) * S::DIM) {
                prefetch_line(window_keys + slot * S::DIM + line);
                prefetch_line(window_values + slot * S::DIM + line);
            }
        }
        attention.load_query(a.query + ((i64)work.block_row * a.group + work.first_head) * S::DIM, work.num_heads);
        const Row row(cache, work.batch_row);
        if (PQ_MASK) {
            const Share<TILE> share(a, work.split, row.coded);
            const int column = a.starts[work.batch_row] + cache.sink_tokens;
            is_silent = mask_is_silent<THREADS>(a, work.batch_row, column + share.first * TILE, column + share.end * TILE);
        }
        if (slot < num_slots) {
            const int ring_first = row.ring_first();
            if (slot < row.used_slots(ring_first)) {  // asked once: kept for the next tiles it would take a register
                do {
                    attention.window_tile(row, ring_first, slot, num_slots - 1, window_keys, window_values);
                    slot += WARPS * a.splits * TILE;
                } while (slot < num_slots);
            }
        }
    }

    // Warps begin with different lanes so that they renew their places at different times: few wait at once.
    int cursor = 2 * (thread_number() >> 5);
    Tiles tiles(a, cursor);
    const u8* key_pages = (const u8*)cache.desc[0] + lane * S::WORDS * 4;
    const i64 to_values = cache.desc[1] - cache.desc[0];  // the same for all lanes: no register of theirs
    opaque(key_pages);
    auto next_place = [&]() {
        if (cursor == 32) tiles.renew(a, work.kv_head), cursor = 0;
        return __shfl_sync(~0u, tiles.places, cursor++);
    };
    typename Attention<S, HEADS>::Codes keys, values;
    u32 key_stage = S::STAGES + warp * S::STAGE_BYTES + lane * 16;
    opaque(key_stage);
    const u32 value_stage = key_stage + S::TILE_BYTES;
    u32 at = 0;  // the place of the tile whose keys were asked for last
    auto keys_at = [&](u32 place) { return key_pages + (i64)place * S::TILE_BYTES; };
    auto values_at = [&](u32 place) { return keys_at(place) + to_values; };
    auto further_keys = [&]() { return keys_at(at = next_place()); };
    auto their_values = [&]() { return values_at(at); };
    auto score_tile = [&]() { attention.score_tile(keys); };
    auto value_tile = [&]() { attention.value_tile(values); };
    if (tiles.count > 0) {
        keys.ask(further_keys(), key_stage);
        values.ask(their_values(), value_stage);
    }
    // Values of one tile and keys of the next form one basic block: look-ups and multiplications interleave. Beyond the last
    // tile codes are those of page 0, and unused.
    auto attend_tiles = [&]() {
        keys.consume(further_keys, key_stage, score_tile);
        attention.rescale();
        tables.wait_values();
        for (int left = tiles.count - 1; left > 0; left--) {
            const u32 next = next_place();
            values.consume(their_values, value_stage, value_tile);
            keys.consume([&]() { return keys_at(next); }, key_stage, score_tile);
            at = next;
            attention.rescale();
        }
        values.receive(value_stage);
        value_tile();
    };
    // Where the mask hides something: tile after tile, and everything made anew, so that this loop takes no register from
    // the one above.
    auto attend_masked_tiles = [&]() {
        int column = a.starts[Work(a).batch_row] + cache.sink_tokens;
        column += (share_again(a).first + (thread_number() >> 5)) * TILE;
        tables.wait_values();
        for (; tiles.count > 0; tiles.count--, column += WARPS * TILE) {
            keys.consume(further_keys, key_stage, score_tile);
            const int lane = thread_number() & 31;
            attention.apply_mask(lane < TILE ? mask_bias(a, Work(a).batch_row, column + lane) : 0.f);
            attention.rescale();
            values.consume(their_values, value_stage, value_tile);
        }
    };
    const bool is_silent_everywhere = tables.wait_keys(is_silent);
    if (PQ_MASK && !is_silent_everywhere)
        attend_masked_tiles();
    else if (tiles.count > 0)
        attend_tiles();
    tables.wait_values();  // also where no tile came: the copy must not land in what finish() writes
    attention.finish(tables_at<S>(dynamic));
}

#define PQ_ATTEND(...)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ AttendArgs args) { \
        attend_tuned<Shape<__VA_ARGS__>, PQ_HEADS>(args);                                                      \
    }
