#include "arena.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <utility>

namespace lk {
namespace {

constexpr std::size_t kLine = 64, kSlack = 128;        // bytes: a cache line, and channels rounded up
constexpr std::size_t kLeast = std::size_t(1) << 18;  // bytes of a block
constexpr std::size_t kHuge = std::size_t(1) << 21;   // a large page, where the system gives these

struct Pool {
  std::mutex lock;
  std::vector<std::unique_ptr<Arena>> free;
  std::size_t kept = 0;
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: a thread may outlive the library's other statics
  return *pool;
}

}  // namespace

std::byte* paged(std::size_t size) {
  const bool large = size >= 2 * kHuge;
  void* memory = nullptr;  // not by aligned_alloc, which is for multiples of the alignment alone
  if (::posix_memalign(&memory, large ? kHuge : kLine, (size + kLine - 1) / kLine * kLine) != 0) return nullptr;
  // A system that has no large pages says so, and gives small ones.
  if (large) (void)::madvise(memory, size / kHuge * kHuge, MADV_HUGEPAGE);
  return static_cast<std::byte*>(memory);
}

void Arena::Free::operator()(std::byte* memory) const { std::free(memory); }

Arena::Block Arena::block(std::size_t size, std::size_t held) {
  std::byte* const memory = paged(size);
  TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "lambda_kernels: not enough memory: scratch of ", size,
                   " bytes is needed beside ", held, ": take fewer tasks or images at a time");
  return {std::unique_ptr<std::byte[], Free>(memory), size};
}

std::byte* Arena::bytes_of(std::size_t size) {
  size = (size + kSlack + kLine - 1) / kLine * kLine;
  while (block_ < blocks_.size() && used_ + size > blocks_[block_].size) ++block_, used_ = 0;
  if (block_ == blocks_.size()) blocks_.push_back(block(std::max(size, kLeast), this->size()));
  std::byte* const at = blocks_[block_].memory.get() + used_;
  used_ += size;
  return at;
}

void Arena::reset() {
  rewind({0, 0});
  if (blocks_.size() > 1) {
    const std::size_t all = size();
    blocks_.clear();
    blocks_.push_back(block(all, 0));
  }
}

std::size_t Arena::size() const {
  std::size_t all = 0;
  for (const Block& block : blocks_) all += block.size;
  return all;
}

Borrowed::Borrowed() {
  Pool& from = pool();
  const std::lock_guard<std::mutex> guard(from.lock);
  if (from.free.empty()) {
    arena_ = std::make_unique<Arena>();
    return;
  }
  arena_ = std::move(from.free.back());
  from.free.pop_back();
  from.kept -= arena_->size();
}

Borrowed::~Borrowed() {
  Pool& to = pool();
  try {
    const std::size_t size = arena_->size();
    if (size > kMostKept) return;
    arena_->reset();
    const std::lock_guard<std::mutex> guard(to.lock);
    if (to.kept + size > kMostKept) return;
    to.free.push_back(std::move(arena_));
    to.kept += size;
  } catch (const std::exception&) {  // it is freed instead
  }
}

std::size_t kept_bytes() {
  Pool& of = pool();
  const std::lock_guard<std::mutex> guard(of.lock);
  return of.kept;
}

}  // namespace lk
