#include "gate_isa.inc"
