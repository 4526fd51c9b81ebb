// The form of all error messages:
//   rope::apply(): expected <argument> to <rule>, but got <value>
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <string_view>

namespace rope {

// The beginning of a message. The function's name is without its namespace.
inline std::string expected(std::string_view function, std::string_view argument) {
  return c10::str("rope::", function, "(): expected ", argument, " to ");
}

inline std::string name_of(c10::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

// Evaluates a condition. On symbolic sizes it is assumed to be true, and guarded at run time.
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

}  // namespace rope
