// Runs launches on the CPU.
#pragma once

#include "launch.h"

namespace rope::cpu {

void rotate(const Launch& launch);

}  // namespace rope::cpu
