// head_dim 64, 64 codes of 4 bits: 4 bits a number: two codes, side by side in a byte, look up a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(64, 32, 2, 8)  // numbers of a head, table units, numbers of a unit, bits of a unit
