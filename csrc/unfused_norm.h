// Norms that are no single launch: over dimensions along which angles differ, or, where there is no
// kernel for it, with a weight that varies along them. They are carried out as a norm and a
// rotation, which are, through the dispatcher.
#pragma once

#include "call.h"
#include "norm_operators.h"

namespace rope {

// Whether the checked call, which normalizes, is such a norm: for x, or for q or k.
// weights_may_vary: there is a kernel for weights that vary along dimensions along which angles do.
bool is_unfused(const Call& call, bool weights_may_vary);

// The same of its gradients, which no kernel has for weights of many rows either: those of the
// weight are then computed by ATen's operators.
bool is_unfused_gradient(const NormGradientCall& call);

// Writes what such a call returns to outputs. Intermediate results have the opmath type, so each
// element is rounded once.
void normalize_unfused(const Call& call, const Outputs& outputs);

NormGradients unfused_norm_gradients(const NormGradientCall& call);

}  // namespace rope
