// The choice of a level, from what the processor says of itself.

#include "levels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ropewalk {
namespace {

struct Level {
  const char* name;
  const Kernels* (*find)();
};

constexpr Level kLevels[] = {
    {"avx512_vnni", avx512_vnni_kernels}, {"avx512", avx512_kernels}, {"avx_vnni", avx_vnni_kernels},
    {"avx2", avx2_kernels},               {"portable", portable_kernels},
};

const Kernels* best_up_to(const std::string& name) {
  bool allowed = name.empty();
  std::string names;
  for (const Level& level : kLevels) {
    allowed = allowed || name == level.name;
    names += std::string(names.empty() ? "" : ", ") + level.name;
    if (!allowed) continue;
    if (const Kernels* found = level.find()) return found;
  }
  throw std::invalid_argument("ROPEWALK_CPU_LEVEL: expected one of " + names + ", found '" + name + "'");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) {
    const char* cap = std::getenv("ROPEWALK_CPU_LEVEL");
    found = best_up_to(cap == nullptr ? "" : cap);
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.find() != nullptr) names.emplace_back(level.name);
  }
  return names;
}

void cap_level(const std::string& name) { chosen.store(best_up_to(name), std::memory_order_release); }

}  // namespace ropewalk
