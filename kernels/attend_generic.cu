// Decode attention for any head_dim, M and num_bits, on CUDA cores: decode a tile of keys into shared memory, score it,
// decode its values, add them. Slow next to the tuned kernels, and right wherever they do not exist.
// Defines from the launch: PQ_DIM, PQ_SUBSPACES, PQ_BITS, PQ_TABLE_BYTES (tuned table before the centroids).
#include "softmax.cuh"

constexpr int THREADS = 256, CHUNK = 32, MAX_HEADS = 16;  // CHUNK tokens at a time: one for each lane of a warp
constexpr int CENTROIDS = 1 << PQ_BITS;

struct Scratch {
    static constexpr int LD = PQ_DIM + 1;  // lanes of a warp are tokens: a row apart is a bank apart
    static constexpr int PARTIAL = (PQ_DIM + 3) / 4 * 4;
    float4 merge[THREADS];
    float2 merge_weights[THREADS];
    float query[MAX_HEADS * PQ_DIM];
    float vectors[CHUNK * LD];
    float weights[MAX_HEADS * CHUNK];
    float reference[MAX_HEADS], sum[MAX_HEADS], shrink[MAX_HEADS];
    int flag;
};

// The code at `place` of a stream of PQ_BITS-bit codes.
__device__ __forceinline__ int read_code(const u8* stream, int place) {
    const int bit = place * PQ_BITS, byte = bit >> 3, shift = bit & 7;
    int x = stream[byte];
    if (shift + PQ_BITS > 8) x |= stream[byte + 1] << 8;
    return x >> shift & (CENTROIDS - 1);
}

// Tokens of one chunk: coded ones, or slots of the exact window.
struct Chunk {
    const u8* pages;       // first page of this KV head
    const u16* centroids;  // (M, CENTROIDS, SUB) of this KV head
    const u16* window;     // (slots, DIM)
};

template <bool IS_VALUE>
__device__ __forceinline__ void decode(const CacheArgs& a, const Row& row, const Chunk& chunk, const int* page_row,
                                       int first, int count, bool is_window, float* vectors) {
    constexpr int SUB = PQ_DIM / PQ_SUBSPACES;
    typedef Places<PQ_SUBSPACES, PQ_BITS> P;
    constexpr int LD = Scratch::LD;
    for (int i = threadIdx.x; i < CHUNK * PQ_SUBSPACES; i += THREADS) {
        const int t = i / PQ_SUBSPACES, m = i % PQ_SUBSPACES;
        float* to = vectors + t * LD + m * SUB;
        const u16* from = nullptr;
        bool exact = false;
        if (t < count) {
            if (is_window) {
                if (row.holds(first + t, row.ring_first()))
                    from = chunk.window + (i64)(first + t) * PQ_DIM + m * SUB, exact = true;
            } else {
                const int token = first + t, in_page = token % a.page_size;
                const int page = max(page_row[min(token / a.page_size, a.table_width - 1)], 0);
                const i64 page_bytes = (i64)a.page_size / TILE * P::TILE_BYTES;
                const u8* tile = chunk.pages + page * a.kv_heads * page_bytes + in_page / TILE * P::TILE_BYTES;
                const int place = IS_VALUE ? P::value(in_page % TILE, m) : P::key(in_page % TILE, m);
                from = chunk.centroids + ((i64)m * CENTROIDS + read_code(tile, place)) * SUB;
            }
        }
#pragma unroll
        for (int j = 0; j < SUB; j++)
            to[j] = from == nullptr ? 0.f : exact ? float_of(from[j]) : float_of_half(from[j]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ AttendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= sizeof(Scratch), "the launch gives too little shared memory");
    Scratch& s = *(Scratch*)dynamic;
    const CacheArgs& cache = a.cache;
    const int split = blockIdx.x, batch_row = blockIdx.y, kv_head = blockIdx.z,
              block_row = batch_row * cache.kv_heads + kv_head;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Row row(cache, batch_row);
    const int start = PQ_MASK ? a.starts[batch_row] : 0;
    const int* page_row = cache.page_table + (i64)batch_row * cache.table_width;

    const i64* desc = cache.desc;
    const i64 page_bytes = (i64)cache.page_size / TILE * Places<PQ_SUBSPACES, PQ_BITS>::TILE_BYTES;
    Chunk key, value;
    key.pages = (const u8*)desc[0] + kv_head * page_bytes;
    value.pages = (const u8*)desc[1] + kv_head * page_bytes;
    key.centroids =
        (const u16*)((const u8*)desc[2] + (i64)cache.kv_heads * PQ_TABLE_BYTES) + (i64)kv_head * CENTROIDS * PQ_DIM;
    value.centroids =
        (const u16*)((const u8*)desc[3] + (i64)cache.kv_heads * PQ_TABLE_BYTES) + (i64)kv_head * CENTROIDS * PQ_DIM;
    key.window = (const u16*)desc[4] + (i64)block_row * row.slots() * PQ_DIM;
    value.window = (const u16*)desc[5] + (i64)block_row * row.slots() * PQ_DIM;

    for (int i = threadIdx.x; i < a.group * PQ_DIM; i += THREADS)
        s.query[i] = float_of(a.query[(i64)block_row * a.group * PQ_DIM + i]);
    if (threadIdx.x < MAX_HEADS) s.reference[threadIdx.x] = NOTHING, s.sum[threadIdx.x] = 0.f;
    constexpr int OWN = (MAX_HEADS * PQ_DIM + THREADS - 1) / THREADS;
    float sums[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) sums[i] = 0.f;

    const int coded_chunks = (row.coded + CHUNK - 1) / CHUNK;
    const int window_slots = row.used_slots(row.ring_first()), window_chunks = (window_slots + CHUNK - 1) / CHUNK;
    const int chunks = coded_chunks + window_chunks;
    const int begin = (int)((i64)chunks * split / a.splits), end = (int)((i64)chunks * (split + 1) / a.splits);
    for (int i = begin; i < end; i++) {
        const bool is_window = i >= coded_chunks;
        const int first = (is_window ? i - coded_chunks : i) * CHUNK;
        const int count = min(CHUNK, (is_window ? window_slots : row.coded) - first);
        constexpr int LD = Scratch::LD;
        __syncthreads();
        decode<false>(cache, row, key, page_row, first, count, is_window, s.vectors);
        __syncthreads();
        for (int h = warp; h < a.group; h += THREADS / 32) {
            float x = 0.f;
            for (int d = 0; d < PQ_DIM; d++) x += s.query[h * PQ_DIM + d] * s.vectors[lane * LD + d];
            const bool holds = lane < count && (!is_window || row.holds(first + lane, row.ring_first()));
            const int token =
                is_window ? row.token_in(first + lane, row.ring_first()) : cache.sink_tokens + first + lane;
            x = holds ? soft_cap(a, x) + mask_bias(a, batch_row, start + token) : -infinity();
            x *= a.scale_log2;
            float top = x;
#pragma unroll
            for (int m = 16; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
            const float before = s.reference[h], now = fmaxf(before, top);
            const float p = exp2_fast(x - now);
            float sum = p;
#pragma unroll
            for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(~0u, sum, m);
            s.weights[h * CHUNK + lane] = p;
            __syncwarp();
            if (lane == 0) {
                s.shrink[h] = exp2_fast(before - now);
                s.sum[h] = s.sum[h] * s.shrink[h] + sum;
                s.reference[h] = now;
            }
        }
        __syncthreads();
        decode<true>(cache, row, value, page_row, first, count, is_window, s.vectors);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const int at = j * THREADS + threadIdx.x, h = at / PQ_DIM, d = at % PQ_DIM;
            if (h < a.group) {
                float o = sums[j] * s.shrink[h];
                for (int t = 0; t < CHUNK; t++) o += s.weights[h * CHUNK + t] * s.vectors[t * LD + d];
                sums[j] = o;
            }
        }
    }
    __syncthreads();
    constexpr int PARTIAL = Scratch::PARTIAL;
    const Parts<PARTIAL> parts(a, block_row);
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const int at = j * THREADS + threadIdx.x, h = at / PQ_DIM, d = at % PQ_DIM;
        if (h >= a.group) continue;
        if (a.splits == 1) {
            const float scale = normalizer(a, kv_head * a.group + h, s.reference[h], s.sum[h]);
            a.out[((i64)block_row * a.group + h) * PQ_DIM + d] = element_of(sums[j] * scale);
        } else {
            const i64 part = (i64)split * a.group + h;
            store_shared_level(parts.sums + part * PARTIAL + d, sums[j]);
            if (d == 0) store_shared_level(parts.weights + part, make_float2(s.reference[h], s.sum[h]));
        }
    }
    if (a.splits == 1) return;
    int* tickets = (int*)desc[6] + cache.batch;
    // The padded columns of PARTIAL hold nothing; they are merged and dropped.
    if (arrive_last(tickets + block_row, a.splits, &s.flag))
        merge_splits<PARTIAL, PQ_DIM, 1, THREADS>(a, block_row, 0, a.group, s.merge);
}
