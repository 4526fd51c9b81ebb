#include "cpu/memory.h"

#include <cstdint>
#include <cstdlib>
#include <string_view>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rope::cpu {

#ifdef __linux__
namespace {

bool may_advise() {
  static const bool may = [] {
    const char* variable = std::getenv("ROPE_HUGE_PAGES");
    return variable == nullptr || std::string_view(variable) != "0";
  }();
  return may;
}

}  // namespace
#endif

void prefer_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.const_data_ptr());
  const std::uintptr_t end = begin + fresh.nbytes();
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first + kHugePage <= end && may_advise()) {
    // It is a wish: where it fails, pages are of the usual size.
    madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#else
  (void)fresh;
#endif
}

}  // namespace rope::cpu
