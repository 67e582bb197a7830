// The tables that this processor can run, and the one in use. Files of one instruction set must not include this header,
// because they must not use the standard library.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace hmr {

extern const Table* table;  // the one in use

std::vector<std::string> instruction_sets();  // the names of the tables that this processor can run, slowest first
bool use(const std::string& name);            // false if this processor cannot run it

}  // namespace hmr
