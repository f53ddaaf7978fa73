// head_dim 64, 64 codes of 6 bits: 6 bits a number: a code is one number, padded to a pair.
#include "attend_tuned.cuh"
PQ_ATTEND(64, 64, 2, 6)  // numbers of a head, table units, numbers of a unit, bits of a unit
