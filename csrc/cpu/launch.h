// Runs launches on the CPU.
#pragma once

#include "rotate.h"

namespace rope::cpu {

void launch(const Launch& launch);

}  // namespace rope::cpu
