// How codes are looked up: tables in shared memory, a lane's codes, codewords as they come out. Knows nothing of
// attention. Defines from the launch: PQ_DIM, PQ_KEY_M, PQ_KEY_BITS, PQ_VALUE_M, PQ_VALUE_BITS, PQ_WARPS, PQ_PIECE,
// PQ_HELD.
#pragma once
#include "page.cuh"

constexpr int WARPS = PQ_WARPS, THREADS = WARPS * 32;
constexpr int DIM = PQ_DIM;
constexpr int PIECE = PQ_PIECE;  // tiles that a warp takes at a time, of one page
constexpr int HELD = PQ_HELD;    // tiles of codes in registers: what is looked up now, and what is on its way
static_assert(PIECE <= 4, "a lane has the scales of two tokens of a piece");
static_assert(PIECE % HELD == 0, "a tile's registers are those of the same tile of the next piece");

// The table of one side. Row `unit` holds its numbers as fp16 pairs, COPIES times, so that every lane of a warp (or of
// the half or quarter of it that wide loads serve at a time) has a copy in banks of its own: no look-up waits for
// another.
template <class C_>
struct Table {
    typedef C_ C;
    static constexpr int WIDTH = C::UNIT_NUMBERS <= 2    ? 2
                                 : C::UNIT_NUMBERS <= 4  ? 4
                                 : C::UNIT_NUMBERS <= 8  ? 8
                                 : C::UNIT_NUMBERS <= 16 ? 16
                                 : C::UNIT_NUMBERS <= 32 ? 32
                                                         : 64;
    static constexpr int PAIRS = WIDTH / 2, COPIES = 32 / PAIRS, ROWS = 1 << C::UNIT_BITS;
    static constexpr int STEPS = (C::UNITS * PAIRS + 7) / 8, SLOTS = (C::UNITS + 7) / 8;
    static_assert(C::UNIT_NUMBERS <= 64, "a unit is at most the 128 bytes that a side has of a row");

    // Numbers 2 h and 2 h + 1 of a unit that is there, as they lie in a vector of the model's dtype; zero where there
    // is none.
    static __device__ __forceinline__ u32 load_pair(const u16* unit, int h) {
        if (2 * h >= C::UNIT_NUMBERS) return 0;
        if (C::UNIT_NUMBERS % 2 == 0) return load_global((const u32*)unit + h);
        return load_global(unit + 2 * h) | (2 * h + 1 < C::UNIT_NUMBERS ? load_global(unit + 2 * h + 1) << 16 : 0u);
    }
};
typedef Table<Codes<PQ_DIM, PQ_KEY_M, PQ_KEY_BITS>> KeyTable;
typedef Table<Codes<PQ_DIM, PQ_VALUE_M, PQ_VALUE_BITS>> ValueTable;

// Addresses in shared memory are built from codes by one byte permutation: the tables begin at a constant, rows of both
// sides lie next to each other, 128 bytes each.
constexpr int TABLES = 1024, ROW_BYTES = 256;
constexpr int TABLE_ROWS = KeyTable::ROWS > ValueTable::ROWS ? KeyTable::ROWS : ValueTable::ROWS;

// A lane's units of one side of a tile, in registers. Codes that are not dealt to lanes are read where they lie.
template <class T, bool IS_VALUE>
struct LaneCodes {
    typedef typename T::C C;
    static constexpr int N = C::DEALT ? C::WORDS : 1, FULL = C::DEALT ? C::FULL_WORDS : 1, WIDE = FULL / 4 * 4;
    u32 words[N];
    const u8* tile;

    // Asks for a tile; where `yes` is false, for nothing.
    __device__ __forceinline__ void ask(const u8* from, int lane, bool yes) {
        tile = from;
        if (!C::DEALT || !yes) return;
#pragma unroll
        for (int i = 0; i < WIDE; i += 4) {
            const uint4 x = load_stream((const uint4*)(from + i * 128) + lane);
            words[i] = x.x, words[i + 1 < N ? i + 1 : 0] = x.y, words[i + 2 < N ? i + 2 : 0] = x.z;
            words[i + 3 < N ? i + 3 : 0] = x.w;
        }
        if (FULL & 2) {
            const uint2 x = load_stream((const uint2*)(from + WIDE * 128) + lane);
            words[WIDE < N ? WIDE : 0] = x.x, words[WIDE + 1 < N ? WIDE + 1 : 0] = x.y;
        }
        if (FULL & 1) words[FULL - 1] = load_stream((const u32*)(from + (FULL - 1) * 128) + lane);
        if (N > FULL) words[N - 1] = load_stream((const u16*)(from + FULL * 128) + lane);
    }

    // Table row of the lane's unit number `j`, as an address: 256 times the unit and the lane's offset.
    __device__ __forceinline__ u32 row(int j, u32 offset, int lane) const {
        constexpr int BITS = C::UNIT_BITS;
        if (!C::DEALT) {
            const int g = lane >> 2, c = lane & 3;
            const int token = IS_VALUE ? c + 4 * (j & 3) : g + 8 * (j & 1),
                      unit = IS_VALUE ? g + 8 * (j >> 2) : c + 4 * (j >> 1);
            if (unit >= C::UNITS) return offset;
            const int bit = (token * C::UNITS + unit) * BITS, shift = bit & 7;
            u32 x = tile[bit >> 3];
            if (shift + BITS > 8) x |= (u32)tile[(bit >> 3) + 1] << 8;
            return (x >> shift & ((1 << BITS) - 1)) << 8 | offset;
        }
        if (BITS == 8) return pick_bytes(words[j / 4 < N ? j / 4 : 0], offset, 0x5504 | (j & 3) << 4);
        const int bit = j * BITS, word = bit >> 5, shift = bit & 31;
        u32 x;
        if (shift < 8)
            x = words[word] << (8 - shift);
        else if (shift + BITS <= 32)
            x = words[word] >> (shift - 8);
        else
            x = shift_pair_right(words[word], words[word + 1 < N ? word + 1 : word], shift - 8);
        return (x & ((1 << BITS) - 1) << 8) | offset;
    }
};

// The pairs of a unit.
template <class T>
__device__ __forceinline__ void look_up(u32 row, int side, u32 (&x)[T::PAIRS]) {
    const u32 at = row + TABLES + 128 * side;
    if (T::PAIRS == 1) {
        x[0] = load_shared(at);
    } else if (T::PAIRS == 2) {
        const uint2 v = load_shared_pair(at);
        x[0] = v.x, x[T::PAIRS - 1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < T::PAIRS; i += 4) {
            const uint4 v = load_shared_quad(at + 4 * i);
            x[i] = v.x, x[i + 1 < T::PAIRS ? i + 1 : 0] = v.y, x[i + 2 < T::PAIRS ? i + 2 : 0] = v.z;
            x[i + 3 < T::PAIRS ? i + 3 : 0] = v.w;
        }
    }
}

// Which pair of numbers a lane feeds to the products of keys: pair j of step k of lane column c.
struct KeyPair {
    typedef KeyTable T;
    int k, j, c;

    // The pair that has number `number` of a vector.
    __device__ __forceinline__ explicit KeyPair(int number) {
        const int unit = number / T::C::UNIT_NUMBERS, pair = number % T::C::UNIT_NUMBERS / 2;
        constexpr int STEPS_A_UNIT = T::PAIRS < 4 ? 1 : T::PAIRS / 2;
        c = unit & 3;
        j = T::PAIRS == 1 ? unit >> 2 & 1 : pair & 1;
        k = T::PAIRS == 1 ? unit >> 3 : (unit >> 2) * STEPS_A_UNIT + (pair >> 1);
    }
};

// Brings one side's codebook into shared memory; to be waited for.
template <class C>
__device__ __forceinline__ void copy_centroids(u16* to, const u16* centroids) {
    constexpr int CHUNKS = C::CENTROIDS * C::NUMBERS / 8;
    for (int i = threadIdx.x; i < CHUNKS; i += THREADS) copy_async<16>(shared_address(to) + i * 16, centroids + i * 8);
}

// Fills one side's half of the table rows.
template <class T>
__device__ __forceinline__ void fill_table(u8* tables, int side, const u16* centroids) {
    typedef typename T::C C;
    constexpr int CHUNKS = 8, WORDS = T::PAIRS < 4 ? T::PAIRS : 4;  // 16 bytes of a row at a time
#pragma unroll 4
    for (int i = threadIdx.x; i < T::ROWS * CHUNKS; i += THREADS) {
        const int unit = i / CHUNKS, first = T::PAIRS > 4 ? i % (T::PAIRS / 4 + (T::PAIRS < 4)) * 4 : 0;
        u32 x[4];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            if (C::NUMBERS % 2 == 0 && C::SPLIT == 1 && C::NUMBERS == T::WIDTH) {
                x[w] = ((const u32*)centroids)[unit * T::PAIRS + first + w];
            } else {
                u32 halves[2];
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    const int number = 2 * (first + w) + odd,
                              code = unit >> (number / C::NUMBERS * C::BITS) & (C::CENTROIDS - 1);
                    halves[odd] = number < C::UNIT_NUMBERS ? centroids[code * C::NUMBERS + number % C::NUMBERS] : 0;
                }
                x[w] = halves[0] | halves[1] << 16;
            }
        }
#pragma unroll
        for (int w = WORDS; w < 4; w++) x[w] = x[w % WORDS];
        *(uint4*)(tables + unit * ROW_BYTES + side * 128 + i % CHUNKS * 16) = uint4{x[0], x[1], x[2], x[3]};
    }
}
