// The headers of the standard library and the compiler that the kernels use, included before an instruction set is chosen.
#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "table.h"
