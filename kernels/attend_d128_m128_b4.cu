// head_dim 128, 128 codes of 4 bits: 4 bits a number: two codes, side by side in a byte, look up a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(128, 64, 2, 8)  // numbers of a head, table units, numbers of a unit, bits of a unit
