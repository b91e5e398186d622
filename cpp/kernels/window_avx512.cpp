#include "window_isa.inc"
