// The size of the cache that cores share.
#pragma once

#include <cstddef>

namespace vitreg {

// Bytes; 32 MiB where the system does not say.
size_t last_level_cache();

}  // namespace vitreg
