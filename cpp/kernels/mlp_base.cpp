#include "mlp_isa.inc"
