// Prefill's encode: whole pages of one side of a prompt. One block encodes one page of one (row, KV head).
// Defines from the launch: PQ_DIM, PQ_M, PQ_BITS, PQ_VALUE.
#include "encode.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3) encode(const __grid_constant__ EncodeArgs a) {
    PQ_DYNAMIC_SHARED(dynamic);
    typedef Codes<PQ_DIM, PQ_M, PQ_BITS> C;
    typedef PageEncoder<C, PQ_VALUE, 1> Encoder;
    static_assert(PQ_SHARED_BYTES >= sizeof(EncodeScratch<C>), "too little shared memory");
    const int kv_head = blockIdx.x % a.kv_heads, page_at = blockIdx.x / a.kv_heads % a.pages_per_row;
    const int batch_row = blockIdx.x / a.kv_heads / a.pages_per_row;
    const int page = a.page_ids[batch_row * a.pages_per_row + page_at];
    if (page < 0) return;
    const u16* source = a.source + batch_row * a.batch_stride + kv_head * a.head_stride;
    const int start = a.first_token[batch_row] + page_at * a.page_size;
    auto vector_of = [&](int token) { return source + min(max(start + token, 0), a.tokens - 1) * a.token_stride; };

    const auto block = Block<u8>::of<C>(a.pages + page * a.page_stride, a.page_size, a.kv_heads, kv_head, PQ_VALUE);
    Encoder encoder(dynamic, block, a.page_size, PQ_VALUE ? nullptr : a.equaliser + kv_head * DIM, a.gain);
    encoder.load_centroids(a.centroids, a.cells);
    encoder.take_statistics(true, 0, a.page_size, vector_of);
    encoder.encode(0, a.page_size, vector_of);
    encoder.pad();
}
