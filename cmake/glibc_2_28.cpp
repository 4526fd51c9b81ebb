// Definitions in place of those of newer libraries than a system with glibc 2.28 has.
#include <new>

extern "C" {
// libstdc++ looks at this variable of glibc 2.32 before it counts references without atomic
// instructions. This one tells it to use them always.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Of GCC 11's libstdc++.
namespace std {
[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
