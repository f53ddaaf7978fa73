// Prefill's encode: codes of whole pages, written in page layout. One block serves TOKENS tokens of one (row, KV head):
// each warp takes subspaces in turn, each lane COUNT tokens.
#include "encode.cuh"

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32;
constexpr int COUNT = SUB <= 4 ? 8 : SUB <= 8 ? 4 : SUB <= 16 ? 2 : 1, TOKENS = 32 * COUNT;
// Subspaces a warp takes at a time: 8 bytes of every vector where the source is aligned for it, one subspace otherwise.
constexpr int TOGETHER = PQ_VECTOR && SUB <= 4 && PQ_SUBSPACES % (4 / SUB) == 0 ? 4 / SUB : 1;

extern "C" __global__ void __launch_bounds__(THREADS, 2) encode(const __grid_constant__ EncodeArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= sizeof(EncodeScratch<WARPS>) + TOKENS * PQ_SUBSPACES, "too little shared memory");
    EncodeScratch<WARPS>& s = *(EncodeScratch<WARPS>*)dynamic;
    u8* codes = (u8*)dynamic + sizeof(EncodeScratch<WARPS>);  // (tile, place)
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int range = a.pages_per_row * a.page_size, blocks = (range + TOKENS - 1) / TOKENS;
    const int kv_head = blockIdx.x % a.kv_heads, first = blockIdx.x / a.kv_heads % blocks * TOKENS;
    const int batch_row = blockIdx.x / a.kv_heads / blocks;
    const int* page_ids = a.page_ids + (i64)batch_row * a.pages_per_row;
    const u16* source = a.source + batch_row * a.batch_stride + kv_head * a.head_stride;
    const int start = a.first_token[batch_row];

    const u16* vectors[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const int token = start + min(first + lane + 32 * j, range - 1);
        vectors[j] = source + min(max(token, 0), a.tokens - 1) * a.token_stride;
    }
    for (int group = warp; group < PQ_SUBSPACES / TOGETHER; group += WARPS) {
        u32 pairs[COUNT][TOGETHER * SUB == 4 ? 2 : 1];
        if (TOGETHER * SUB == 4) {
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                const uint2 x = *(const uint2*)(vectors[j] + group * 4);
                pairs[j][0] = x.x, pairs[j][TOGETHER * SUB == 4 ? 1 : 0] = x.y;
            }
        }
#pragma unroll 1
        for (int part = 0; part < TOGETHER; part++) {
            const int m = group * TOGETHER + part;
            load_centroids(a.centroids + ((i64)kv_head * PQ_SUBSPACES + m) * CENTROIDS * SUB, s.tables[warp], lane);
            float one[COUNT][SUB];
            int code[COUNT];
#pragma unroll
            for (int j = 0; j < COUNT; j++)
#pragma unroll
                for (int i = 0; i < SUB; i++) {
                    if (TOGETHER * SUB == 4) {  // the number at part * SUB + i of the four
                        const int at = part * SUB + i;
                        const u32 pair = at < 2 ? pairs[j][0] : pairs[j][TOGETHER * SUB == 4 ? 1 : 0];
                        one[j][i] = float_of((u16)(at & 1 ? pair >> 16 : pair));
                    } else {
                        one[j][i] = float_of(vectors[j][m * SUB + i]);
                    }
                }
            nearest<COUNT>(s.tables[warp], one, code);
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                const int token = lane + 32 * j, in_tile = token % TILE;
                const int place = a.is_value ? PagePlaces::value(in_tile, m) : PagePlaces::key(in_tile, m);
                codes[token / TILE * TILE * PQ_SUBSPACES + place] = (u8)code[j];
            }
        }
    }
    __syncthreads();
    const int tiles_per_page = a.page_size / TILE;
    for (int tile = warp; tile < TOKENS / TILE; tile += WARPS) {
        const int at = first / TILE + tile, page = at / tiles_per_page;
        if (page >= a.pages_per_row || page_ids[page] < 0) continue;
        const i64 place = ((i64)page_ids[page] * a.kv_heads + kv_head) * tiles_per_page + at % tiles_per_page;
        write_tile(codes + tile * TILE * PQ_SUBSPACES, a.pages + place * PagePlaces::TILE_BYTES, lane, 32);
    }
}
