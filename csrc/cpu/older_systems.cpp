// Lets a library that a new compiler built run on systems with an older glibc and libstdc++: from glibc 2.28 on, as torch's
// own wheels. What the headers of the new ones refer to and the older ones lack stands here instead; tests/package sees to it.
#if defined(__linux__) && defined(__x86_64__)

#include <sstream>

#if defined(__GLIBCXX__)

// Of GCC 9; they come by the messages in torch's headers. Instantiated here, the linker does not look for them elsewhere.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

#if __has_include(<sys/single_threaded.h>)
// Of glibc 2.32: whether this process has one thread only, so that references may be counted without atomics. Here never.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

#endif
#endif
