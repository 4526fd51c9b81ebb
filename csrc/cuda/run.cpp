// Through torch's interface for devices of any kind: librope.so needs no library of CUDA, and
// serves builds of torch with and without it.
#include "cuda/run.h"

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace rope::cuda {

namespace {

// Calls enqueue with the current stream of the device.
template <typename Enqueue>
void enqueue_on(int index, const Enqueue& enqueue) {
  const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
  const c10::DeviceGuard guard(device);
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(device);
  c10::DataPtr memory;
  const auto allocate = [&](std::int64_t bytes) {
    memory = c10::GetAllocator(c10::kCUDA)->allocate(bytes);
    return memory.get();
  };
  const Status status = enqueue(Stream{index, current.native_handle(), allocate});
  if (status != 0) {
    const c10::SourceLocation here{__func__, "rope", static_cast<std::uint32_t>(__LINE__)};
    throw c10::AcceleratorError(here, status, c10::str("CUDA error: ", describe(status)));
  }
}

}  // namespace

bool has_kernels() { return are_compiled(); }

void rotate(const Launch& launch, int device) {
  enqueue_on(device, [&](const Stream& stream) { return rotate(launch, stream); });
}

void normalize(const Launch& launch, int device) {
  enqueue_on(device, [&](const Stream& stream) { return normalize(launch, stream); });
}

void normalize_gradient(const Launch& launch, int device, MakeWeightSums make_weight_sums) {
  enqueue_on(device, [&](const Stream& stream) {
    return normalize_gradient(launch, stream, make_weight_sums);
  });
}

void sum(const Launch& launch, int device, MakeSums make_sums) {
  enqueue_on(device, [&](const Stream& stream) { return sum(launch, stream, make_sums); });
}

void scatter_rows(const TableSums& sums, int device) {
  enqueue_on(device, [&](const Stream& stream) { return scatter_rows(sums, stream); });
}

}  // namespace rope::cuda
