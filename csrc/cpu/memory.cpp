#include "cpu/memory.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rope::cpu {

void prefer_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.const_data_ptr());
  const std::uintptr_t end = begin + fresh.nbytes();
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first + kHugePage <= end) {
    // It is a wish: where it fails, pages are of the usual size.
    madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#else
  (void)fresh;
#endif
}

}  // namespace rope::cpu
