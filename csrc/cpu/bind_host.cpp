// Threads and memory for the kernels.
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <map>
#include <mutex>
#include <new>

#include "bind.h"

#ifdef __has_feature  // clang's way to tell what GCC defines
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__
#endif
#endif

namespace trm_fast {

// Blocks that no operation uses at the moment.
class Pool {
 public:
  TorchHost::Block take(size_t bytes) {
    if (!EXACT) {
      bytes = (bytes + 63) / 64 * 64;
      std::lock_guard<std::mutex> guard(lock_);
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= bytes + bytes / 4 + 4096) {
        const TorchHost::Block block{found->second, found->first};
        free_.erase(found);
        kept_ -= block.bytes;
        return block;
      }
    }
    void* start = nullptr;
    const bool large = bytes >= HUGE;
    if (posix_memalign(&start, large ? HUGE : 64, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (large) madvise(start, bytes, MADV_HUGEPAGE);
#endif
    if (EXACT) memset(start, 0xff, bytes);  // a NaN of every dtype, where it is used unwritten
    return {start, bytes};
  }

  void give(TorchHost::Block block) noexcept {
    std::lock_guard<std::mutex> guard(lock_);
    try {
      free_.emplace(block.bytes, block.start);
      kept_ += block.bytes;
    } catch (...) {  // no memory to note it
      free(block.start);
    }
    shrink(EXACT ? 0 : MOST_KEPT);
  }

  size_t kept() const noexcept {
    std::lock_guard<std::mutex> guard(lock_);
    return kept_;
  }

  void release() noexcept {
    std::lock_guard<std::mutex> guard(lock_);
    shrink(0);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)  // a block each, of exactly the size: what is beyond is noticed
  static constexpr bool EXACT = true;
#else
  static constexpr bool EXACT = false;
#endif
  static constexpr size_t HUGE = 2u << 20, MOST_KEPT = 512u << 20;

  void shrink(size_t most) noexcept {
    while (kept_ > most) {
      const auto largest = std::prev(free_.end());
      kept_ -= largest->first;
      free(largest->second);
      free_.erase(largest);
    }
  }

  mutable std::mutex lock_;
  std::multimap<size_t, void*> free_;
  size_t kept_ = 0;
};

static Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: threads may outlive static objects
  return *one;
}

static void run(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

TorchHost::TorchHost() {
  threads = (int)std::max<uint32_t>(1, torch::stable::get_num_threads());
  Host::run = &trm_fast::run;
  allocate = &TorchHost::take;
  owner = this;
}

TorchHost::~TorchHost() {
  for (const Block& block : taken_) pool().give(block);
}

void* TorchHost::take(const Host* host, size_t bytes) {
  auto& taken = static_cast<TorchHost*>(host->owner)->taken_;
  taken.reserve(taken.size() + 1);
  taken.push_back(pool().take(bytes));
  return taken.back().start;
}

Tensor new_pooled(std::vector<int64_t> shape, ScalarType dtype) {
  int64_t count = 1;
  std::vector<int64_t> strides(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = count;
    count *= std::max<int64_t>(shape[i], 1);
  }
  const size_t width = dtype == ScalarType::Float ? 4 : dtype == ScalarType::BFloat16 ? 2 : 1;
  const auto block = pool().take(std::max<size_t>((size_t)count * width, 64));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block.start, shape, strides, cpu, dtype,
                                  [block](void*) { pool().give(block); });
}


}  // namespace trm_fast

// Of the pool, in bytes; and give it back to the system.
extern "C" __attribute__((visibility("default"))) int64_t trm_fast_kept_memory() {
  return (int64_t)trm_fast::pool().kept();
}
extern "C" __attribute__((visibility("default"))) void trm_fast_release_memory() {
  trm_fast::pool().release();
}
