#include "attend_isa.inc"
