// One decode step's tokens of a cache of codes: a page that leaves the window is encoded.
#include "encode.cuh"

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32;
#include "append.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) append(const __grid_constant__ AppendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= sizeof(EncodeScratch<WARPS>) + TOKENS * PQ_SUBSPACES, "too little shared memory");
    EncodeScratch<WARPS>& s = *(EncodeScratch<WARPS>*)dynamic;
    u8* codes = (u8*)dynamic + sizeof(EncodeScratch<WARPS>);
    append_token(a, [&](const Leaving& leaving) {
        const CacheArgs& cache = a.cache;
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        const u16* centroids =
            (const u16*)((const u8*)cache.desc[2 + leaving.is_value] + (i64)cache.kv_heads * PQ_TABLE_BYTES);
        const u16* vector = leaving.vector(cache, min(leaving.part * TOKENS + lane, cache.page_size - 1));
        for (int m = warp; m < PQ_SUBSPACES; m += WARPS) {
            load_centroids(centroids + ((i64)leaving.kv_head * PQ_SUBSPACES + m) * CENTROIDS * SUB, s.tables[warp],
                           lane);
            float v[1][SUB];
#pragma unroll
            for (int i = 0; i < SUB; i++) v[0][i] = float_of(vector[m * SUB + i]);
            int code[1];
            nearest<1>(s.tables[warp], v, code);
            const int place = leaving.is_value ? PagePlaces::value(lane % TILE, m) : PagePlaces::key(lane % TILE, m);
            codes[lane / TILE * TILE * PQ_SUBSPACES + place] = (u8)code[0];
        }
        __syncthreads();
        const int tiles_per_page = cache.page_size / TILE, tile = leaving.part * (TOKENS / TILE) + warp;
        if (warp < TOKENS / TILE && tile < tiles_per_page) {
            const i64 place = ((i64)leaving.page * cache.kv_heads + leaving.kv_head) * tiles_per_page + tile;
            write_tile(codes + warp * TILE * PQ_SUBSPACES,
                       (u8*)cache.desc[leaving.is_value] + place * PagePlaces::TILE_BYTES, lane, 32);
        }
    });
}
