// The threads of the CUDA kernels, run on the host, and tensors to run them on.
#pragma once

#include <cstdint>

#include "cuda/thread.h"
#include "reference.h"

namespace host {

// Elements around a tensor that nothing may write.
constexpr std::int64_t kGuard = 64;

// How the threads of a launch are run; all ways must give the same bits.
struct Running {
  bool last_thread_first = false;
  bool index_is_64bit = false;  // also where 32 bits are enough
};

// Runs every thread of the blocks [first_block, last_block).
template <typename Threads>
void run_blocks(const Threads& threads, const rope::cuda::Work& work, std::int64_t first_block,
                std::int64_t last_block, const Running& running) {
  const std::int64_t begin = first_block * work.threads;
  const std::int64_t end = last_block * work.threads;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t turn = running.last_thread_first ? end - 1 - (i - begin) : i;
    threads.run(turn / work.threads, static_cast<int>(turn % work.threads));
  }
}

// All that is in the storage of x.
inline at::Tensor storage_of(const at::Tensor& x) {
  return at::empty({0}, x.options()).set_(x.storage());
}

inline at::Tensor with_storage(const at::Tensor& flat, const at::Tensor& like) {
  return flat.as_strided(like.sizes(), like.strides(), like.storage_offset());
}

// A view of the given strides into a larger buffer of random numbers.
inline at::Tensor strided_values(at::IntArrayRef sizes, at::IntArrayRef strides,
                                 std::int64_t offset = 0, at::ScalarType dtype = at::kFloat) {
  std::int64_t reach = offset + 1;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    reach += (sizes[d] - 1) * strides[d];
  }
  return reference::random_values({reach + 2 * kGuard}, dtype)
      .as_strided(sizes, strides, kGuard + offset);
}

template <typename Run>
void for_each_dtype(const Run& run) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    SCOPED_TRACE(c10::str("dtype = ", dtype));
    run(dtype);
  }
}

// The two orders of pairs and the two directions.
template <typename Run>
void for_each_form(const Run& run) {
  for (const bool interleaved : {false, true}) {
    for (const bool conjugate : {false, true}) {
      SCOPED_TRACE(c10::str("interleaved = ", interleaved, ", conjugate = ", conjugate));
      run(interleaved, conjugate);
    }
  }
}

}  // namespace host
