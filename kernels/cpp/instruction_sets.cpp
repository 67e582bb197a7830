#include "instruction_sets.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hmr {

const Table* table = &generic_table;
bool tiles_allowed = false;

// Whether this processor has AMX and Linux permits this process to use its tiles. Linux grants the permission per process,
// because it adds 8 KB of registers to each thread.
static bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    const unsigned BF16_AND_TILE = 1u << 22 | 1u << 24;
    const int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16_AND_TILE) == BF16_AND_TILE &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

static std::vector<const Table*> runnable() {
    std::vector<const Table*> tables = {&generic_table};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2_table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) {
        tables.push_back(&avx512_table);
        if (has_tiles()) tables.push_back(&amx_table);
    }
#endif
    return tables;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto* each : runnable()) names.push_back(each->name);
    return names;
}

bool use(const std::string& name) {
    for (const auto* each : runnable())
        if (each->name == name) {
            table = each;
            tiles_allowed = each == &amx_table;
            return true;
        }
    return false;
}

}  // namespace hmr
