// From a checked call to the launches that carry it out.
#pragma once

#include <c10/util/FunctionRef.h>

#include "call.h"
#include "launch.h"

namespace rope {

// Calls launch for each launch that the call needs: one for nearly every call. A pair whose tensors
// differ in dtype needs two; so do views whose dimensions are too many and too irregular for one
// nest. Pointers in the description live as long as the call of launch.
void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch);

}  // namespace rope
