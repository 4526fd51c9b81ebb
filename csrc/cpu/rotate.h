// Runs launches on the CPU.
#pragma once

#include "launch.h"

namespace rope::cpu {

void rotate(const Launch& launch);

// For launches that normalize.
void normalize(const Launch& launch);

// For launches of their gradients, that of x (Operand::out) and those of the weights.
void normalize_gradient(const Launch& launch, MakeWeightSums make_weight_sums);

}  // namespace rope::cpu
