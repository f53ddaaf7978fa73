// One decode step's keys and values: each into its row's window, and where that is full by a page, the page out of it;
// how a page is written is the caller's. Grid: (blocks of a team, teams). Each block of a team looks at all its rows, so
// that all know which pages leave; then they share out first the parts of these pages and then the tokens. So rows cost
// no blocks that only find nothing to do. Defines from the launch: PQ_DIM.
#pragma once
#include "page.cuh"

constexpr int TEAM_ROWS = 128;  // at most, a thread for each
constexpr int LEAST_PART = 2;   // tiles of a page that a block writes: more where many pages leave at once

// What a block knows of its team's rows.
struct Team {
    int target[TEAM_ROWS];  // of each row: the new token's slot, of KV head 0; -1: none
    int window[TEAM_ROWS], ring[TEAM_ROWS], page[TEAM_ROWS];  // of each page that leaves: see Leaving
    u32 full[TEAM_ROWS / 32];                                 // which rows of a warp's have one
    int is_last;
};

// A page that leaves the window: the tokens of it that a block writes, of one KV head and side.
struct Leaving {
    const u16* window;  // slots of this (row, KV head) and side
    int ring;           // ring slot of the page's first token
    int page;           // its id
    int first, count;   // tokens
    int kv_head, is_value;

    // Where token `token` of the page lies in the window.
    __device__ __forceinline__ const u16* vector(const CacheArgs& cache, int token) const {
        int slot = ring + token;
        if (slot >= cache.window_slots) slot -= cache.window_slots;
        return window + (i64)(cache.sink_tokens + slot) * PQ_DIM;
    }
    __device__ __forceinline__ u8* target(const CacheArgs& cache) const {
        return (u8*)cache.layer->pages[is_value] + page * cache.page_stride;
    }
};

// Looks at `rows` rows from first_row on, this thread at one.
__device__ __forceinline__ void look_at_rows(const CacheArgs& cache, Team& team, int first_row, int rows) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = first_row + threadIdx.x;
    int window = 0, ring = 0, page = 0;
    bool leaves = false;
    if ((int)threadIdx.x < rows) {
        const Row now(cache, row);
        const bool is_full = now.left + 1 - (int)cache.layer->recent_tokens >= cache.page_size;
        const int length = now.length(), page_at = now.coded / cache.page_size, body = length - cache.sink_tokens;
        if (is_full)
            page = page_at < cache.table_width ? cache.page_table[(i64)row * cache.table_width + page_at] : -1;
        leaves = is_full && page >= 0;
        window = cache.window_block(row, 0, row * cache.kv_heads) * now.slots(), ring = now.ring_first();
        const int slot = body < 0 ? length : cache.sink_tokens + body % cache.window_slots;
        team.target[threadIdx.x] = page < 0 ? -1 : window + slot;
    }
    const u32 full = __ballot_sync(~0u, leaves);
    if (lane == 0 && warp < TEAM_ROWS / 32) team.full[warp] = full;
    __syncthreads();
    if (leaves) {
        int at = __popc(full & ((1u << lane) - 1));
        for (int w = 0; w < warp; w++) at += __popc(team.full[w]);
        team.window[at] = window, team.ring[at] = ring, team.page[at] = page;
    }
    __syncthreads();
}

// write_page(const Leaving&) stores some tokens of a leaving page.
template <class WritePage>
__device__ __forceinline__ void append_tokens(const AppendArgs& a, void* shared, WritePage write_page) {
    Team& team = *(Team*)shared;
    const CacheArgs& cache = a.cache;
    const Layer& layer = *cache.layer;
    const int rows_each = (cache.batch + gridDim.y - 1) / gridDim.y, first_row = blockIdx.y * rows_each;
    const int rows = min(rows_each, cache.batch - first_row), slots = cache.sink_tokens + cache.window_slots;
    const int blocks = gridDim.x;
    let_next_start();
    wait_for_earlier();
    look_at_rows(cache, team, first_row, rows);

    int leaving = 0;
#pragma unroll
    for (int w = 0; w < TEAM_ROWS / 32; w++) leaving += __popc(team.full[w]);
    const int tiles = cache.page_size / TILE, page_heads = leaving * cache.kv_heads * 2;
    int part = LEAST_PART;
    while (part < tiles && page_heads * ((tiles + part - 1) / part) > blocks) part *= 2;
    const int parts = (tiles + part - 1) / part, all_parts = page_heads * parts;
    // The leaving page and the new token's slot are apart: the ring is a page longer than what must stay.
    for (int i = blockIdx.x; i < all_parts; i += blocks) {
        const int first = i % parts * part * TILE, is_value = i / parts % 2, kv_head = i / parts / 2 % cache.kv_heads;
        const int at = i / parts / 2 / cache.kv_heads;
        const u16* window = layer.window[is_value] + (i64)(team.window[at] + kv_head * slots) * PQ_DIM;
        const int count = min(part * TILE, cache.page_size - first);
        write_page(Leaving{window, team.ring[at], team.page[at], first, count, kv_head, is_value});
        __syncthreads();
    }
    // The last block to have read the counts moves them.
    int* ticket = layer.tickets + blockIdx.y;
    if (threadIdx.x == 0) team.is_last = take_ticket(ticket) == blocks - 1;

    // Tokens, a warp each, by the blocks that had no page if these are many.
    const int skipped = 2 * all_parts <= blocks ? all_parts : 0, lane = threadIdx.x & 31;
    for (int i = ((int)blockIdx.x - skipped) * (THREADS / 32) + (int)(threadIdx.x / 32);
         i >= 0 && i < rows * cache.kv_heads * 2; i += (blocks - skipped) * (THREADS / 32)) {
        const int vector = i >> 1, is_value = i & 1, row_at = vector / cache.kv_heads;
        const int target = team.target[row_at];
        if (target < 0) continue;
        const u16* from = (is_value ? a.value : a.key) + ((i64)first_row * cache.kv_heads + vector) * PQ_DIM;
        u16* to = layer.window[is_value] + (i64)(target + vector % cache.kv_heads * slots) * PQ_DIM;
#pragma unroll
        for (int number = 0; number < PQ_DIM; number += 32)
            if (number + lane < PQ_DIM) to[number + lane] = from[number + lane];
    }
    __syncthreads();
    if (!team.is_last) return;
    const int own = threadIdx.x;
    if (own == 0) *ticket = 0;
    if (own >= rows) return;
    if (team.target[own] < 0) {
        atomicOr(a.flags, 1);  // nowhere to go: the row stays as it is
    } else {
        int* counts = cache.counts + 2 * (first_row + own);
        counts[0]++;
        if (team.full[own / 32] >> own % 32 & 1) counts[1] += cache.page_size;
    }
}
