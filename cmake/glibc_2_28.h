// Included in every C++ file of a build with ROPE_GLIBC_2_28, for wheels that run where glibc
// is 2.28. glibc gave these functions new versions in 2.29, which differ in errno alone; the linker
// would take the newest.
#pragma once

#ifdef __x86_64__
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
#endif
