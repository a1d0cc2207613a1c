// Which kernels this process uses.

#pragma once

#include <string>
#include <vector>

#include "packed.h"

namespace ropewalk {

// The best level that the processor has and ROPEWALK_CPU_LEVEL, or a later `cap_level`, allows.
const Kernels& kernels();

// The names of the levels that this processor has, best first.
std::vector<std::string> levels();

// Use the best level of this processor that is not above the named one. Throws std::invalid_argument for a name
// that no level has.
void cap_level(const std::string& name);

}  // namespace ropewalk
