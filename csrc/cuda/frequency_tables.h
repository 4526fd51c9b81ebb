// Keeps the frequencies of max_wavelength in device memory, one table for each set of them and
// device. Plain host code: what a table needs of a device is a parameter (the real one is in
// cuda/upload.cu), so the tests can run it on a fake.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
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
//   struct Upload { const void* words; ... };
//   // Allocates device memory and starts to fill it. words is null if there is no room. Not called
//   // by two threads at once.
//   Upload start_upload(int device, const std::uint64_t* values, std::int64_t count);
//   // Whether the memory is filled. Called by any number of threads at once.
//   bool is_complete(const Upload& upload);
//
// Nothing waits: not for the upload, since the host could then not run ahead of the device, and a
// stream that is being captured cannot be waited for; nor for another thread. A caller that gets
// no table uploads the frequencies with its launch instead.
template <typename Device>
class FrequencyTables {
 public:
  // Of one device. Captured graphs may hold the addresses of tables, so none is ever freed, and a
  // program that changes max_wavelength from call to call must not fill the memory.
  static constexpr int kMaxTables = 64;

  explicit FrequencyTables(Device device = {}) : device_(std::move(device)) {}

  // Returns device memory that holds the num_pairs frequencies, complete for every launch from now
  // on; null if there is no such table, or not yet. Reads values (host memory) only to make one.
  const void* find(int device, const FrequencyKey& key, const std::uint64_t* values) {
    Table* table = find_table(device, key);
    if (table == nullptr) {
      table = make_table(device, key, values);
    }
    return table != nullptr && is_complete(*table) ? table->upload.words : nullptr;
  }

 private:
  struct Table {
    int device;
    FrequencyKey key;
    typename Device::Upload upload;
    std::atomic<bool> is_complete{false};
    Table* older;
  };

  // Usually a program has one or two tables: comparing keys is all that a call costs, without a
  // lock. All but is_complete is constant once newest_ leads to the table.
  Table* find_table(int device, const FrequencyKey& key) const {
    Table* table = newest_.load(std::memory_order_acquire);
    while (table != nullptr && !(table->device == device && table->key == key)) {
      table = table->older;
    }
    return table;
  }

  Table* make_table(int device, const FrequencyKey& key, const std::uint64_t* values) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return nullptr;
    }
    if (Table* made_meanwhile = find_table(device, key)) {
      return made_meanwhile;
    }
    int count = 0;
    for (const Table& table : tables_) {
      count += table.device == device;
    }
    if (count == kMaxTables) {
      return nullptr;
    }
    // A table that found no room stays, without words: an allocation that fails is slow, and is not
    // repeated.
    const auto upload = device_.start_upload(device, values, key.num_pairs);
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
    if (table.upload.words == nullptr || !device_.is_complete(table.upload)) {
      return false;
    }
    table.is_complete.store(true, std::memory_order_release);
    return true;
  }

  Device device_;
  std::mutex mutex_;          // Guards start_upload and tables_
  std::deque<Table> tables_;  // Owns them; growing it does not move them.
  std::atomic<Table*> newest_{nullptr};
};

}  // namespace rope::cuda
