// One decode step's tokens of a cache that compresses nothing: a page that leaves the window is copied.
constexpr int THREADS = 256;
#include "append.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) append(const __grid_constant__ AppendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    static_assert(PQ_SHARED_BYTES >= sizeof(Team), "too little shared memory");
    append_tokens(a, dynamic, [&](const Leaving& leaving) {
        constexpr int WORDS = PQ_DIM / 8;  // of 16 bytes, a token
        const CacheArgs& cache = a.cache;
        uint4* to = (uint4*)leaving.target(cache) + ((i64)leaving.kv_head * cache.page_size + leaving.first) * WORDS;
        for (int i = threadIdx.x; i < leaving.count * WORDS; i += THREADS)
            to[i] = ((const uint4*)leaving.vector(cache, leaving.first + i / WORDS))[i % WORDS];
    });
}
