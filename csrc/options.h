// The one list of the operators' options. Saving for backward, packing, the Python module and the
// schemas all follow it. Not for .cu files: nvcc 13.0 rejects lambdas in constexpr functions.
#pragma once

#include <tuple>
#include <type_traits>

namespace rope {

// An option: its name in the schemas, and get(options), the member of that name of any struct of
// options that has it.
template <typename Get>
struct Option {
  const char* name;
  Get get;
};
template <typename Get>
Option(const char*, Get) -> Option<Get>;

#define ROPE_OPTION(member)                                                             \
  Option {                                                                              \
    #member, [](auto& options) -> decltype((options.member)) { return options.member; } \
  }

// In the order of the schemas: each operator takes those that its struct of options has.
constexpr auto all_options() {
  return std::tuple{
      ROPE_OPTION(embedding_axis), ROPE_OPTION(rotary_dim),
      ROPE_OPTION(rotary_offset),  ROPE_OPTION(max_wavelength),
      ROPE_OPTION(scale_factor),   ROPE_OPTION(attention_factor),
      ROPE_OPTION(interleaved),    ROPE_OPTION(conjugate),
      ROPE_OPTION(full_width),     ROPE_OPTION(eps),
      ROPE_OPTION(weight_offset),  ROPE_OPTION(norm_axes),
      ROPE_OPTION(norm_last),
  };
}

#undef ROPE_OPTION

// Calls visit(name, member) for each option that Options has.
template <typename Options, typename Visit>
void visit_options(Options& options, const Visit& visit) {
  const auto visit_one = [&](const auto& option) {
    if constexpr (std::is_invocable_v<decltype(option.get), Options&>) {
      visit(option.name, option.get(options));
    }
  };
  std::apply([&](const auto&... option) { (visit_one(option), ...); }, all_options());
}

// Sets the options that both structs have.
template <typename To, typename From>
void copy_options(const From& from, To& to) {
  const auto copy_one = [&](const auto& option) {
    using Get = decltype(option.get);
    if constexpr (std::is_invocable_v<Get, const From&> && std::is_invocable_v<Get, To&>) {
      option.get(to) = option.get(from);
    }
  };
  std::apply([&](const auto&... option) { (copy_one(option), ...); }, all_options());
}

template <typename To, typename From>
To convert_options(const From& from) {
  To to;
  copy_options(from, to);
  return to;
}

}  // namespace rope
