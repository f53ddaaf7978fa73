// head_dim 128, 64 codes of 6 bits: 3 bits a number: a code is a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(128, 64, 2, 6)  // numbers of a head, table units, numbers of a unit, bits of a unit
