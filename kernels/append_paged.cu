// One decode step's tokens of a cache that compresses nothing: a page that leaves the window is copied.
constexpr int THREADS = 256;
#include "append.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) append(const __grid_constant__ AppendArgs a) {
    append_token(a, [&](const Leaving& leaving) {
        constexpr int WORDS = PQ_DIM / 8;  // of 16 bytes, a token
        const CacheArgs& cache = a.cache;
        const int first = leaving.part * TOKENS, count = min(TOKENS, cache.page_size - first);
        const i64 row = ((i64)leaving.page * cache.kv_heads + leaving.kv_head) * cache.page_size + first;
        uint4* to = (uint4*)cache.desc[leaving.is_value] + row * WORDS;
        for (int i = threadIdx.x; i < count * WORDS; i += THREADS)
            to[i] = ((const uint4*)leaving.vector(cache, first + i / WORDS))[i % WORDS];
    });
}
