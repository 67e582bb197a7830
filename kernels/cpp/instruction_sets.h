// Which of the tables this processor can run, and the one that is called. Not for the files of one instruction set, which use
// nothing of the standard library.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace hmr {

extern const Table* table;  // the one that is called

std::vector<std::string> instruction_sets();  // those of the tables that can run, by name, worst first
bool use(const std::string& name);            // false where it cannot run

}  // namespace hmr
