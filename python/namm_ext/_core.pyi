"""Build information and CPU detection of namm_ext."""

N_FFT: int
HOP: int
CARRY: int
NUM_BINS: int
NUM_FEATURES: int
HIDDEN: int
NUM_BAM_PARAMS: int

def build_info() -> dict[str, str]:
    """Version, and the torch, compiler and build type this was built with."""

def supported_isas() -> list[str]:
    """Instruction sets of this CPU that the kernels know, worst first."""
