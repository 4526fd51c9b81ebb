// Memory next to inaccessible pages, for tests/test_guard_pages.py, which builds this file and
// preloads it into a process of Python: the memory of CPU tensors, and what is allocated with an
// alignment, as the workspaces of kernels are.
//
// Guarded memory is filled with 0xff: NaN in every floating-point dtype, -1 in every integer. What
// is left of its pages is filled too, and compared when the memory is released.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

enum Placement : int { kAnywhere, kAtEnd, kAtBegin };  // of what pages, if any
std::atomic<int> placement = kAnywhere;

constexpr unsigned char kPoison = 0xff;

struct Region {
  unsigned char* pages;  // the accessible ones, between two that are not
  std::size_t page_bytes;
  unsigned char* data;
  std::size_t bytes;
};

std::size_t page() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "guard: %s\n", message);
  std::abort();
}

Region reserve(std::size_t bytes, std::size_t alignment) {
  const std::size_t page_bytes = (bytes + page() - 1) / page() * page();
  void* mapped =
      mmap(nullptr, page_bytes + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    fail("no memory");
  }
  auto* pages = static_cast<unsigned char*>(mapped) + page();
  if (mprotect(pages, page_bytes, PROT_READ | PROT_WRITE) != 0) {
    fail("mprotect failed");
  }
  std::memset(pages, kPoison, page_bytes);
  const std::size_t room = page_bytes - bytes;
  return {pages, page_bytes, placement == kAtEnd ? pages + room / alignment * alignment : pages,
          bytes};
}

void release(const Region& region) {
  for (std::size_t i = 0; i < region.page_bytes; ++i) {
    const unsigned char* at = region.pages + i;
    const bool is_outside = at < region.data || at >= region.data + region.bytes;
    if (is_outside && *at != kPoison) {
      fail(at < region.data ? "written before the begin of memory"
                            : "written behind the end of memory");
    }
    if (at == region.data && region.bytes > 0) {
      i += region.bytes - 1;
    }
  }
  munmap(region.pages - page(), region.page_bytes + 2 * page());
}

class GuardedAllocator final : public c10::Allocator {
 public:
  explicit GuardedAllocator(c10::Allocator* unguarded) : unguarded_(unguarded) {}

  c10::DataPtr allocate(std::size_t bytes) override {
    if (placement == kAnywhere || bytes == 0) {
      return unguarded_->allocate(bytes);
    }
    auto* region = new Region(reserve(bytes, 1));
    const auto deleter = [](void* context) {
      auto* guarded = static_cast<Region*>(context);
      release(*guarded);
      delete guarded;
    };
    return {region->data, region, deleter, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  c10::Allocator* unguarded_;
};

struct Aligned {
  std::mutex mutex;
  std::unordered_map<void*, Region> regions;

  static Aligned& get() {
    static auto* aligned = new Aligned;  // never destroyed: threads end after it would be
    return *aligned;
  }
};

std::atomic<std::size_t> num_aligned = 0;

void* allocate_aligned(std::size_t bytes, std::size_t alignment) {
  if (placement == kAnywhere || bytes == 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes == 0 ? 1 : bytes) != 0) {
      throw std::bad_alloc();
    }
    return memory;
  }
  const Region region = reserve(bytes, alignment);
  const std::lock_guard lock(Aligned::get().mutex);
  Aligned::get().regions.emplace(region.data, region);
  ++num_aligned;
  return region.data;
}

void release_aligned(void* memory) {
  if (memory == nullptr) {
    return;
  }
  Region region{};
  {
    const std::lock_guard lock(Aligned::get().mutex);
    const auto found = Aligned::get().regions.find(memory);
    if (found != Aligned::get().regions.end()) {
      region = found->second;
      Aligned::get().regions.erase(found);
    }
  }
  region.pages == nullptr ? std::free(memory) : release(region);
}

}  // namespace

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_aligned(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory, std::align_val_t) noexcept { release_aligned(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  release_aligned(memory);
}

extern "C" {

// Before any other call.
void guard_install() {
  static GuardedAllocator allocator(c10::GetDefaultCPUAllocator());
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
}

void guard_place(int where) { placement = where; }

// How much memory was allocated with an alignment, to show that workspaces are.
std::size_t guard_num_aligned() { return num_aligned; }
}
