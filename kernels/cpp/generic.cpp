// The kernels for the compiler's default instruction set.
#include "headers.h"
#define ISA generic
#define LANES 4
#include "kernels.h"

const hmr::Table hmr::generic_table = HMR_TABLE("generic");
