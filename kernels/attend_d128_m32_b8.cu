// head_dim 128, 32 codes of 8 bits: 2 bits a number: a code is four numbers.
#include "attend_tuned.cuh"
PQ_ATTEND(128, 32, 4, 8)  // numbers of a head, table units, numbers of a unit, bits of a unit
