// A thread block whose threads are fibers, and a launch of many: what simt_emulation.h is built on.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace vlcache {
namespace cuda {
namespace emulation {

struct Index {
  unsigned x, y, z;
};

enum class Operation { kNone, kShuffle, kMatrices, kMultiply };

// What a lane brings to a warp operation.
struct Deposit {
  Operation operation;
  float value;
  const uint16_t* row;
  uint32_t a[4], b[2];
};

enum class Status { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  Status status = Status::kReady;
  unsigned operations = 0;  // warp operations so far; its lowest bit says which deposits are current
  std::vector<Copy> copies;
};

// Stacks of fibers, used again by the next block.
class Stacks {
 public:
  static constexpr size_t kNbytes = 256 << 10;

  char* at(size_t i) {
    while (stacks_.size() <= i) stacks_.emplace_back(new char[kNbytes]);
    return stacks_[i].get();
  }

 private:
  std::vector<std::unique_ptr<char[]>> stacks_;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int threads, size_t shared_nbytes, Index index, Index grid, std::mt19937& random)
      : threads_(threads), index_(index), grid_(grid), random_(random), shared_(new char[shared_nbytes + 16]) {
    current() = this;
    shared_start_ = shared_.get() + (16 - reinterpret_cast<uintptr_t>(shared_.get()) % 16) % 16;
    std::memset(shared_.get(), 0xff, shared_nbytes + 16);
    deposits_.resize(2 * size_t(threads));
  }

  ~Block() { current() = nullptr; }

  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs `body` once per thread, one after the other in random order: for kernels whose threads know nothing of others.
  void run_apart(const std::function<void()>& body) {
    std::vector<size_t> order(static_cast<size_t>(threads_));
    std::iota(order.begin(), order.end(), size_t(0));
    std::shuffle(order.begin(), order.end(), random_);
    for (size_t thread : order) {
      running_ = thread;
      body();
    }
  }

  // Runs `body` once per thread. Throws what a GPU would leave undefined.
  void run_together(const std::function<void()>& body, Stacks& stacks) {
    body_ = &body;
    fibers_.resize(size_t(threads_));
    for (size_t i = 0; i < fibers_.size(); ++i) start(fibers_[i], stacks.at(i));
    while (const size_t ready = choose()) {
      running_ = ready - 1;
      switch_to(fibers_[running_]);
      if (!error_.empty()) throw std::runtime_error(error_);
      release();
    }
    for (const Fiber& fiber : fibers_) {
      if (fiber.status != Status::kDone) throw std::runtime_error("threads wait for others that never come");
    }
  }

  int thread() const { return int(running_); }
  int threads() const { return threads_; }
  Index index() const { return index_; }
  Index grid() const { return grid_; }
  char* shared() const { return shared_start_; }
  Fiber& fiber() { return fibers_[running_]; }
  bool toss() { return random_() % 2 == 0; }

  void wait(Status status) {
    if (fibers_.empty()) fail("threads that run apart cannot wait for others");
    fiber().status = status;
    switch_back();
  }

  void fail(const std::string& error) {
    if (fibers_.empty()) throw std::runtime_error(error);
    error_ = error;
    switch_back();
  }

  // Hands in what this lane brings, waits for the warp, and returns what lane `i` brought as `result[i]`.
  const Deposit* exchange(const Deposit& mine) {
    Fiber& self = fiber();
    const size_t side = self.operations++ % 2 * size_t(threads_), first = running_ / 32 * 32;
    deposits_[side + running_] = mine;
    wait(Status::kAtWarp);
    for (size_t i = first; i < first + 32; ++i) {
      if (deposits_[side + i].operation != mine.operation) fail("lanes of a warp do different things");
    }
    return &deposits_[side + first];
  }

 private:
  static void enter() {
    Block& self = *current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self.main_stack_, &self.main_stack_size_);
#endif
    (*self.body_)();
    if (!self.fiber().copies.empty()) self.error_ = "a thread ends before its copies do";
    self.fiber().status = Status::kDone;
    self.switch_back();
  }

  void start(Fiber& fiber, char* stack) {
    fiber.stack = stack;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = Stacks::kNbytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  void switch_to(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, Stacks::kNbytes);
    swapcontext(&main_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&main_, &fiber.context);
#endif
  }

  void switch_back() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, main_stack_, main_stack_size_);
    swapcontext(&fiber().context, &main_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&fiber().context, &main_);
#endif
  }

  // One more than the number of a thread that can run, 0 when none can.
  size_t choose() {
    const size_t first = random_() % fibers_.size();
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const size_t candidate = (first + i) % fibers_.size();
      if (fibers_[candidate].status == Status::kReady) return candidate + 1;
    }
    return 0;
  }

  void release() {
    const size_t first = running_ / 32 * 32;
    release_if_all(first, first + 32, Status::kAtWarp);
    release_if_all(0, fibers_.size(), Status::kAtBarrier);
  }

  void release_if_all(size_t first, size_t end, Status status) {
    for (size_t i = first; i < end; ++i) {
      if (fibers_[i].status != status) return;
    }
    for (size_t i = first; i < end; ++i) fibers_[i].status = Status::kReady;
  }

  int threads_;
  Index index_, grid_;
  std::mt19937& random_;
  std::unique_ptr<char[]> shared_;
  char* shared_start_;
  std::vector<Deposit> deposits_;
  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  size_t running_ = 0;
  std::string error_;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_stack_size_ = 0;
};

// A whole launch, its blocks one after the other in random order.
class Launch {
 public:
  Launch(Index grid, int threads, size_t shared_nbytes, unsigned seed)
      : grid_(grid), threads_(threads), shared_nbytes_(shared_nbytes), random_(seed) {}

  void run_apart(const std::function<void()>& body) {
    for_each_block([&](Block& block) { block.run_apart(body); });
  }

  void run_together(const std::function<void()>& body) {
    Stacks stacks;
    for_each_block([&](Block& block) { block.run_together(body, stacks); });
  }

 private:
  void for_each_block(const std::function<void(Block&)>& run) {
    std::vector<Index> indices;
    for (unsigned z = 0; z < grid_.z; ++z) {
      for (unsigned y = 0; y < grid_.y; ++y) {
        for (unsigned x = 0; x < grid_.x; ++x) indices.push_back({x, y, z});
      }
    }
    std::shuffle(indices.begin(), indices.end(), random_);
    for (const Index& index : indices) {
      Block block(threads_, shared_nbytes_, index, grid_, random_);
      run(block);
    }
  }

  Index grid_;
  int threads_;
  size_t shared_nbytes_;
  std::mt19937 random_;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace vlcache
