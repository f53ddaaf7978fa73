// head_dim 128, 64 codes of 4 bits: 2 bits a number: two codes, side by side in a byte, look up four numbers.
#include "attend_tuned.cuh"
PQ_ATTEND(128, 32, 4, 8)  // numbers of a head, table units, numbers of a unit, bits of a unit
