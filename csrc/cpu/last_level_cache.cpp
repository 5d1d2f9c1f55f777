#include "last_level_cache.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace vitreg {

namespace {

size_t read() {
    size_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
        size_t kilobytes = 0;
        char unit = 0;
        if (file >> kilobytes >> unit && unit == 'K') largest = std::max(largest, kilobytes << 10);
    }
    return largest > 0 ? largest : 32 << 20;
}

}  // namespace

size_t last_level_cache() {
    static const size_t bytes = read();
    return bytes;
}

}  // namespace vitreg
