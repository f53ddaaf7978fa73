// One decode step's tokens of a cache of codes: a page that leaves the window is encoded.
// Defines from the launch: PQ_DIM, PQ_KEY_M, PQ_KEY_BITS, PQ_VALUE_M, PQ_VALUE_BITS.
#include "encode.cuh"
#include "append.cuh"

constexpr int TEAM_BYTES = (sizeof(Team) + 15) & ~15;

template <class C, bool IS_VALUE>
__device__ __forceinline__ void encode_part(const CacheArgs& cache, const Leaving& leaving, void* scratch) {
    static_assert(PQ_SHARED_BYTES >= TEAM_BYTES + sizeof(EncodeScratch<C>), "too little shared memory");
    auto vector_of = [&](int token) { return leaving.vector(cache, token); };
    const Layer& layer = *cache.layer;
    const auto block =
        Block<u8>::of<C>(leaving.target(cache), cache.page_size, cache.kv_heads, leaving.kv_head, IS_VALUE);
    const float* equaliser = IS_VALUE ? nullptr : layer.equaliser + leaving.kv_head * DIM;
    // All tokens that are needed are asked for at once.
    const int first = IS_VALUE ? leaving.first : 0;
    const int lines = (IS_VALUE ? leaving.count : cache.page_size) * NUMBERS_A_LANE;
    for (int i = threadIdx.x; i < lines; i += THREADS)
        prefetch_line(vector_of(first + i / NUMBERS_A_LANE) + i % NUMBERS_A_LANE * 32);
    PageEncoder<C, IS_VALUE, 4> encoder(scratch, block, cache.page_size, equaliser, layer.gain[IS_VALUE]);
    encoder.load_centroids(layer.centroids[IS_VALUE], layer.cells[IS_VALUE]);
    encoder.take_statistics(leaving.first == 0, leaving.first, leaving.count, vector_of);
    encoder.encode(leaving.first, leaving.count, vector_of);
    if (leaving.first == 0) encoder.pad();
}

extern "C" __global__ void __launch_bounds__(THREADS) append(const __grid_constant__ AppendArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    void* scratch = (u8*)dynamic + TEAM_BYTES;
    append_tokens(a, dynamic, [&](const Leaving& leaving) {
        if (leaving.is_value)
            encode_part<Codes<PQ_DIM, PQ_VALUE_M, PQ_VALUE_BITS>, true>(a.cache, leaving, scratch);
        else
            encode_part<Codes<PQ_DIM, PQ_KEY_M, PQ_KEY_BITS>, false>(a.cache, leaving, scratch);
    });
}
