// Results in huge pages, where the system offers them on request.
#pragma once

#include <cstddef>

namespace vitreg {

// Asks for huge pages behind memory that is about to be written. An allocator takes large results fresh from the system
// each time; page by page of 4 KiB, the system's part in a call that does little arithmetic is longer than the call's.
// Of memory that is there already, and where the request is refused, nothing changes.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace vitreg
