// Which of the instruction sets of this build the machine can run, and which is used.
#pragma once

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace pcm {

// The sets this machine can run, best last.
std::vector<const Isa*> available_isas();
// The best one, or the one asked for; throws std::invalid_argument naming what there is.
const Isa& select_isa(const std::string& name);

}  // namespace pcm
