// head_dim 64, 64 codes of 8 bits: 8 bits a number: a code is one number, padded to a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(64, 64, 2, 8)  // numbers of a head, table units, numbers of a unit, bits of a unit
