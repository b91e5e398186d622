#include "bam_isa.inc"
