// From a checked call to the launches that carry it out.
#pragma once

#include <c10/util/FunctionRef.h>

#include "call.h"
#include "launch.h"

namespace rope {

// Calls launch for each launch that the call needs: one, or two for a pair whose tensors differ in
// dtype. Tensors with more than kMaxDims dimensions that do not coalesce are copied first. The
// pointers of a launch are valid during the call of launch.
void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch);

}  // namespace rope
