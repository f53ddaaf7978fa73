// One decode step's key and value of every (row, KV head): into the window, and when the window is full by a page, that
// page out of it; how a page is written is the caller's. Grid: (row, KV head, key or value, 32 tokens of a page);
// nearly all blocks only copy or leave. Defines from the launch: PQ_DIM.
#pragma once
#include "page.cuh"

constexpr int PART = 32;  // tokens of a page that a block writes

// A page that leaves the window: this block's share of it.
struct Leaving {
    const u16* window;  // slots of this (row, KV head) and side
    int first_slot;     // ring slot of the page's first token
    int page;           // its id
    int part;           // tokens PART * part and on are this block's
    int kv_head, is_value;

    // Where token `token` of the page lies in the window.
    __device__ __forceinline__ const u16* vector(const CacheArgs& cache, int token) const {
        return window + (i64)(cache.sink_tokens + (first_slot + token) % cache.window_slots) * PQ_DIM;
    }
    __device__ __forceinline__ u8* target(const CacheArgs& cache) const {
        return (u8*)cache.layer->pages[is_value] + page * cache.page_stride;
    }
};

// write_page(const Leaving&) stores this block's share of the leaving page.
template <class WritePage>
__device__ __forceinline__ void append_token(const AppendArgs& a, WritePage write_page) {
    const CacheArgs& cache = a.cache;
    const Layer& layer = *cache.layer;
    const int parts = (cache.page_size + PART - 1) / PART, blocks_per_row = cache.kv_heads * 2 * parts;
    const int batch_row = blockIdx.x / blocks_per_row, part = blockIdx.x % parts;
    const int is_value = blockIdx.x / parts % 2, kv_head = blockIdx.x / parts / 2 % cache.kv_heads;
    const int block_row = batch_row * cache.kv_heads + kv_head;
    let_next_start();
    wait_for_earlier();
    const Row now(cache, batch_row);
    const int window_block = cache.window_block(batch_row, kv_head, block_row);
    const int length = now.length(), recent_tokens = (int)layer.recent_tokens, page_at = now.coded / cache.page_size;
    const bool is_full = now.left + 1 - recent_tokens >= cache.page_size;
    int page = 0;
    if (is_full)
        page = page_at < cache.table_width ? cache.page_table[(i64)batch_row * cache.table_width + page_at] : -1;

    if (page < 0) {  // nowhere to go: keep everything as it is and say so
        if (threadIdx.x == 0) atomicOr(a.flags, 1);
    } else {
        u16* window = layer.window[is_value] + (i64)window_block * now.slots() * PQ_DIM;
        if (part == 0) {
            const int body = length - cache.sink_tokens;
            const int slot = body < 0 ? length : cache.sink_tokens + body % cache.window_slots;
            const u16* from = (is_value ? a.value : a.key) + (i64)block_row * PQ_DIM;
            for (int i = threadIdx.x; i < PQ_DIM; i += THREADS) window[(i64)slot * PQ_DIM + i] = from[i];
        }
        // The leaving page and the new token's slot are apart: the ring is a page longer than what must stay.
        if (is_full) write_page(Leaving{window, now.coded % cache.window_slots, page, part, kv_head, is_value});
    }
    // The last block of the row moves its counts: all others have read them by then.
    __syncthreads();
    if (threadIdx.x == 0) {
        int* ticket = layer.tickets + batch_row;
        if (take_ticket(ticket) == blocks_per_row - 1) {
            *ticket = 0;
            if (page >= 0) {
                cache.counts[2 * batch_row] = length + 1;
                if (is_full) cache.counts[2 * batch_row + 1] = now.coded + cache.page_size;
            }
        }
    }
}
