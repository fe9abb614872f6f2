// Scratch memory that calls hand on to one another: laid out once, then reused by all steps and by later calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace lk {

// Memory for std::free from a cache line on, or null: much of it in large pages, which are there sooner than many small ones.
std::byte* paged(std::size_t size);

class Arena {
 public:
  // `count` values, not initialised, from a cache line on, and readable for 16 values beyond.
  template <typename T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(bytes_of(std::size_t(count) * sizeof(T)));
  }

  struct Mark {
    std::size_t block, used;
  };
  Mark mark() const { return {block_, used_}; }
  void rewind(Mark to) { block_ = to.block, used_ = to.used; }  // gives back what was taken since

  void reset();  // gives back all, and makes one block of several
  std::size_t size() const;

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  struct Block {
    std::unique_ptr<std::byte[], Free> memory;
    std::size_t size;
  };

  std::byte* bytes_of(std::size_t size);
  static Block block(std::size_t size, std::size_t held);  // held: bytes that the call has

  std::vector<Block> blocks_;
  std::size_t block_ = 0, used_ = 0;  // where the next value goes
};

// An arena of the pool, for as long as this lives; no two threads share one.
class Borrowed {
 public:
  Borrowed();
  ~Borrowed();
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Arena& operator*() const { return *arena_; }

 private:
  std::unique_ptr<Arena> arena_;
};

constexpr std::size_t kMostKept = std::size_t(256) << 20;  // bytes of all arenas that wait in the pool

[[gnu::visibility("default")]] std::size_t kept_bytes();  // of the pool now

}  // namespace lk
