// head_dim 128, 32 codes of 6 bits: 1.5 bits a number: a code is four numbers.
#include "attend_tuned.cuh"
PQ_ATTEND(128, 32, 4, 6)  // numbers of a head, table units, numbers of a unit, bits of a unit
