// head_dim 64, 32 codes of 6 bits: 3 bits a number: a code is a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(64, 32, 2, 6)  // numbers of a head, table units, numbers of a unit, bits of a unit
