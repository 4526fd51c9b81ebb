// Keeps frequencies of max_wavelength in device memory: one table per device and set of
// frequencies. Plain host code: the device is a template parameter (the real one is in
// cuda/upload.cu), so that tests can use a fake.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <utility>

namespace rope::cuda {

// Identifies a set of frequencies.
struct FrequencyKey {
  double max_wavelength;
  double scale_factor;  // 1 for radians, which the kernel divides by it
  std::int64_t num_pairs;
  bool in_turns;

  bool operator==(const FrequencyKey&) const = default;
};

// Device has
//   struct Upload { const void* values; ... };
//   // Allocates device memory and starts to fill it. values is null if memory is exhausted. Not
//   // called by two threads at once.
//   Upload start_upload(int device, const std::uint64_t* values, std::int64_t count);
//   // Whether the memory is filled. May be called by any number of threads at once.
//   bool is_complete(const Upload& upload);
//
// Nothing blocks: neither on the upload, since the host should run ahead of the device and a stream
// under capture cannot be waited for, nor on another thread. A caller that gets no table uploads
// the frequencies with its launch instead.
template <typename Device>
class FrequencyTables {
 public:
  // On each device. Tables are never freed, since captured graphs may hold their addresses; the
  // limit keeps a program that changes max_wavelength in every call from filling the memory.
  static constexpr int kMaxTables = 64;

  explicit FrequencyTables(Device device = {}) : device_(std::move(device)) {}

  // Returns device memory with the num_pairs frequencies, complete for every launch from now on;
  // null if there is no table, or not yet. Calls make_values, which returns the frequencies in host
  // memory, only to make a table.
  template <typename MakeValues>
  const void* find(int device, const FrequencyKey& key, const MakeValues& make_values) {
    Table* table = find_table(device, key);
    if (table == nullptr) {
      table = make_table(device, key, make_values);
    }
    return table != nullptr && is_complete(*table) ? table->upload.values : nullptr;
  }

 private:
  struct Table {
    int device;
    FrequencyKey key;
    typename Device::Upload upload;
    std::atomic<bool> is_complete{false};
    Table* older;
  };

  // Without a lock: most programs have one or two tables, so a call costs one or two comparisons.
  // Once a table is reachable from newest_, only its is_complete changes.
  Table* find_table(int device, const FrequencyKey& key) const {
    Table* table = newest_.load(std::memory_order_acquire);
    while (table != nullptr && !(table->device == device && table->key == key)) {
      table = table->older;
    }
    return table;
  }

  template <typename MakeValues>
  Table* make_table(int device, const FrequencyKey& key, const MakeValues& make_values) {
    if (is_making_.test_and_set(std::memory_order_acquire)) {
      return nullptr;
    }
    const Release release{is_making_};
    if (Table* made_by_another = find_table(device, key)) {
      return made_by_another;
    }
    int count = 0;
    for (const Table& table : tables_) {
      count += table.device == device;
    }
    if (count == kMaxTables) {
      return nullptr;
    }
    // A table whose allocation failed stays, without values: failed allocations are slow and must
    // not be repeated.
    const auto upload = device_.start_upload(device, make_values(), key.num_pairs);
    Table& table = tables_.emplace_back();
    table.device = device;
    table.key = key;
    table.upload = upload;
    table.older = newest_.load(std::memory_order_relaxed);
    newest_.store(&table, std::memory_order_release);
    return &table;
  }

  bool is_complete(Table& table) {
    if (table.is_complete.load(std::memory_order_acquire)) {
      return true;
    }
    if (table.upload.values == nullptr || !device_.is_complete(table.upload)) {
      return false;
    }
    table.is_complete.store(true, std::memory_order_release);
    return true;
  }

  struct Release {
    std::atomic_flag& flag;
    ~Release() { flag.clear(std::memory_order_release); }
  };

  Device device_;
  std::atomic_flag is_making_;  // Guards start_upload and tables_. Nobody waits for it.
  std::deque<Table> tables_;    // A deque does not move its elements.
  std::atomic<Table*> newest_{nullptr};
};

}  // namespace rope::cuda
