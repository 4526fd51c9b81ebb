// What all refusals have in common. Every message reads
//   rope::apply(): expected <argument> to <rule>, but got <value>
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <string_view>

namespace rope {

// How it begins, of a function's name without the namespace.
inline std::string expected(std::string_view function, std::string_view argument) {
  return c10::str("rope::", function, "(): expected ", argument, " to ");
}

inline std::string name_of(c10::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

// True, and remembered as a fact, for sizes that are symbols.
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

}  // namespace rope
