// One decode step's key and value of every (row, KV head): into the window, and when the window is full by a page, that
// page's codes out of it. Grid: (row, KV head, key or value, 32 tokens of a page); nearly all blocks only copy or
// leave.
#include "encode.cuh"

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32, TOKENS = 32;

extern "C" __global__ void __launch_bounds__(THREADS) append(const __grid_constant__ AppendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= sizeof(EncodeScratch<WARPS>) + TOKENS * PQ_SUBSPACES, "too little shared memory");
    const CacheArgs& cache = a.cache;
    const int parts = (cache.page_size + TOKENS - 1) / TOKENS, blocks_per_row = cache.kv_heads * 2 * parts;
    const int batch_row = blockIdx.x / blocks_per_row, part = blockIdx.x % parts;
    const int is_value = blockIdx.x / parts % 2, kv_head = blockIdx.x / parts / 2 % cache.kv_heads;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    let_next_start();
    wait_for_earlier();
    const i64* desc = cache.desc;
    const Row now(cache, batch_row);
    const int recent_tokens = (int)desc[7], page_at = now.coded / cache.page_size;
    const bool is_full = now.left + 1 - recent_tokens >= cache.page_size;
    int page = 0;
    if (is_full)
        page = page_at < cache.table_width ? cache.page_table[(i64)batch_row * cache.table_width + page_at] : -1;

    if (page < 0) {  // nowhere to go: keep everything as it is and say so
        if (threadIdx.x == 0) atomicOr(a.flags, 1);
    } else {
        const i64 head_at = (i64)batch_row * cache.kv_heads + kv_head;
        u16* window = (u16*)desc[4 + is_value] + head_at * now.slots() * PQ_DIM;
        if (part == 0) {
            const int length = now.length(), body = length - cache.sink_tokens;
            const int slot = body < 0 ? length : cache.sink_tokens + body % cache.window_slots;
            const u16* from = (is_value ? a.value : a.key) + head_at * PQ_DIM;
            for (int i = threadIdx.x; i < PQ_DIM; i += THREADS) window[(i64)slot * PQ_DIM + i] = from[i];
        }
        if (is_full) {
            // The leaving page and the new token's slot are apart: the ring is a page longer than what must stay.
            EncodeScratch<WARPS>& s = *(EncodeScratch<WARPS>*)dynamic;
            u8* codes = (u8*)dynamic + sizeof(EncodeScratch<WARPS>);
            const u16* centroids = (const u16*)((const u8*)desc[2 + is_value] + (i64)cache.kv_heads * PQ_TABLE_BYTES);
            const int token = min(part * TOKENS + lane, cache.page_size - 1);
            const u16* vector = window + (i64)(cache.sink_tokens + (now.coded + token) % cache.window_slots) * PQ_DIM;
            for (int m = warp; m < PQ_SUBSPACES; m += WARPS) {
                load_centroids(centroids + ((i64)kv_head * PQ_SUBSPACES + m) * CENTROIDS * SUB, s.tables[warp], lane);
                float v[1][SUB];
#pragma unroll
                for (int i = 0; i < SUB; i++) v[0][i] = float_of(vector[m * SUB + i]);
                int code[1];
                nearest<1>(s.tables[warp], v, code);
                const int place = is_value ? PagePlaces::value(lane % TILE, m) : PagePlaces::key(lane % TILE, m);
                codes[lane / TILE * TILE * PQ_SUBSPACES + place] = (u8)code[0];
            }
            __syncthreads();
            const int tiles_per_page = cache.page_size / TILE;
            if (warp < TOKENS / TILE && part * (TOKENS / TILE) + warp < tiles_per_page) {
                const i64 place =
                    ((i64)page * cache.kv_heads + kv_head) * tiles_per_page + part * (TOKENS / TILE) + warp;
                write_tile(codes + warp * TILE * PQ_SUBSPACES, (u8*)desc[is_value] + place * PagePlaces::TILE_BYTES,
                           lane, 32);
            }
        }
    }
    // The last block of the row moves its counts: all others have read them by then.
    __syncthreads();
    if (threadIdx.x == 0) {
        int* ticket = (int*)cache.desc[6] + batch_row;
        if (take_ticket(ticket) == blocks_per_row - 1) {
            *ticket = 0;
            if (page >= 0) {
                cache.counts[2 * batch_row] = now.length() + 1;
                if (is_full) cache.counts[2 * batch_row + 1] = now.coded + cache.page_size;
            }
        }
    }
}
