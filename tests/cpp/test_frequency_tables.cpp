// Tables of frequencies on a fake device, whose uploads complete when a test lets them.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/frequency_tables.h"

namespace {

using rope::cuda::FrequencyKey;
using Values = std::vector<std::uint64_t>;

struct FakeUpload {
  int device;
  Values values;
  Values memory;  // zeros until the upload completes
  std::atomic<int> queries_left;
  std::atomic<bool> is_complete{false};

  void complete() {
    std::copy(values.begin(), values.end(), memory.begin());
    is_complete = true;
  }
};

struct FakeDevice {
  struct Upload {
    const void* values;
    FakeUpload* upload;
  };

  struct State {
    std::deque<FakeUpload> uploads;
    bool has_room = true;
    int queries_until_complete = 1 << 30;  // the default: until a test calls complete()
    std::function<void()> in_the_next_start;
    int started = 0;
    std::atomic<bool> is_starting{false};
    std::atomic<int> queries{0};
  };

  Upload start_upload(int device, const std::uint64_t* values, std::int64_t count) {
    EXPECT_FALSE(state->is_starting.exchange(true)) << "called by two threads at once";
    ++state->started;
    if (const auto run = std::exchange(state->in_the_next_start, nullptr)) {
      run();
    }
    Upload upload{};
    if (state->has_room) {
      upload.upload = &state->uploads.emplace_back();
      upload.upload->device = device;
      upload.upload->values.assign(values, values + count);
      upload.upload->memory.resize(count);
      upload.upload->queries_left = state->queries_until_complete;
      upload.values = upload.upload->memory.data();
    }
    state->is_starting = false;
    return upload;
  }

  bool is_complete(const Upload& upload) const {
    ++state->queries;
    if (--upload.upload->queries_left == 0) {
      upload.upload->complete();
    }
    return upload.upload->is_complete;
  }

  State* state;
};

struct Tables {
  FakeDevice::State device;
  rope::cuda::FrequencyTables<FakeDevice> tables{FakeDevice{&device}};
  std::atomic<int> made{0};  // calls of make_values

  const void* find(int index, const FrequencyKey& key, const Values& values) {
    return tables.find(index, key, [&] {
      ++made;
      return values.data();
    });
  }

  // Finds a table that may be made and is complete at once.
  const void* make(int index, const FrequencyKey& key, const Values& values) {
    device.queries_until_complete = 1;
    return find(index, key, values);
  }
};

constexpr FrequencyKey kKey = {1e4, 1, 3, true};
const Values kValues = {11, 22, 33};

FrequencyKey key_of(int number) { return {1e4 + number, 1, 3, true}; }

Values values_of(int device, int number) {
  const auto first = static_cast<std::uint64_t>(1000 * device + number + 1);
  return {first, 2 * first, 3 * first};
}

Values values_at(const void* table) {
  const auto* first = static_cast<const std::uint64_t*>(table);
  return {first, first + 3};
}

constexpr int kMaxTables = rope::cuda::FrequencyTables<FakeDevice>::kMaxTables;

}  // namespace

TEST(FrequencyTables, AreHandedOutOnlyOnceTheirUploadIsComplete) {
  Tables tables;
  for (int call = 0; call < 3; ++call) {
    EXPECT_EQ(tables.find(0, kKey, kValues), nullptr);
  }
  tables.device.uploads[0].complete();
  const void* table = tables.find(0, kKey, kValues);
  ASSERT_NE(table, nullptr);
  EXPECT_EQ(values_at(table), kValues);
}

TEST(FrequencyTables, UploadTheValuesOfTheFirstCallOnce) {
  Tables tables;
  tables.find(0, kKey, kValues);
  tables.find(0, kKey, {7, 8, 9});
  tables.device.uploads[0].complete();
  const void* table = tables.find(0, kKey, {7, 8, 9});
  ASSERT_NE(table, nullptr);
  EXPECT_EQ(tables.find(0, kKey, {7, 8, 9}), table);
  EXPECT_EQ(values_at(table), kValues);
  EXPECT_EQ(tables.device.started, 1);
}

TEST(FrequencyTables, ComputeValuesOnlyToBeUploaded) {
  Tables tables;
  for (int call = 0; call < 3; ++call) {
    tables.find(0, kKey, kValues);
  }
  EXPECT_EQ(tables.made, 1);
  tables.device.uploads[0].complete();
  EXPECT_NE(tables.find(0, kKey, kValues), nullptr);
  EXPECT_EQ(tables.made, 1);
  tables.find(0, key_of(1), kValues);
  EXPECT_EQ(tables.made, 2);
}

TEST(FrequencyTables, AskTheDeviceNothingOnceTheyAreComplete) {
  Tables tables;
  ASSERT_NE(tables.make(0, kKey, kValues), nullptr);
  const int queries = tables.device.queries;
  EXPECT_NE(tables.find(0, kKey, kValues), nullptr);
  EXPECT_EQ(tables.device.queries, queries);
}

TEST(FrequencyTables, AreApartForKeysThatDifferInAnyField) {
  Tables tables;
  const FrequencyKey keys[] = {
      kKey, {1e5, 1, 3, true}, {1e4, 2, 3, true}, {1e4, 1, 4, true}, {1e4, 1, 3, false}};
  std::vector<const void*> found;
  for (const FrequencyKey& key : keys) {
    const Values values(key.num_pairs, found.size() + 1);
    found.push_back(tables.make(0, key, values));
    ASSERT_NE(found.back(), nullptr);
    EXPECT_EQ(tables.device.uploads.back().memory, values);
  }
  EXPECT_EQ(tables.device.started, 5);
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(tables.find(0, keys[i], kValues), found[i]);
  }
}

TEST(FrequencyTables, AreApartForDevices) {
  Tables tables;
  for (const int device : {0, 1}) {
    const void* table = tables.make(device, kKey, values_of(device, 0));
    ASSERT_NE(table, nullptr);
    EXPECT_EQ(values_at(table), values_of(device, 0));
    EXPECT_EQ(tables.device.uploads.back().device, device);
  }
}

TEST(FrequencyTables, OfOneKeyWaitForNoOther) {
  Tables tables;
  EXPECT_EQ(tables.find(0, key_of(0), kValues), nullptr);
  EXPECT_EQ(tables.find(0, key_of(1), kValues), nullptr);
  tables.device.uploads[1].complete();
  EXPECT_EQ(tables.find(0, key_of(0), kValues), nullptr);
  EXPECT_NE(tables.find(0, key_of(1), kValues), nullptr);
}

TEST(FrequencyTables, AreLimitedInNumberOnEachDevice) {
  Tables tables;
  std::vector<const void*> found;
  for (int number = 0; number < kMaxTables; ++number) {
    found.push_back(tables.make(0, key_of(number), values_of(0, number)));
    ASSERT_NE(found.back(), nullptr);
  }
  EXPECT_EQ(tables.make(0, key_of(kMaxTables), kValues), nullptr);
  EXPECT_EQ(tables.device.started, kMaxTables);
  EXPECT_NE(tables.make(1, key_of(kMaxTables), kValues), nullptr);
  for (int number = 0; number < kMaxTables; ++number) {
    ASSERT_EQ(tables.find(0, key_of(number), kValues), found[number]);
    ASSERT_EQ(values_at(found[number]), values_of(0, number));
  }
}

TEST(FrequencyTables, AreNotTriedAgainWhereThereWasNoRoom) {
  Tables tables;
  tables.device.has_room = false;
  EXPECT_EQ(tables.make(0, kKey, kValues), nullptr);
  tables.device.has_room = true;
  EXPECT_EQ(tables.make(0, kKey, kValues), nullptr);
  EXPECT_EQ(tables.device.started, 1);
  EXPECT_NE(tables.make(0, key_of(1), kValues), nullptr);
}

TEST(FrequencyTables, AreFoundWhileAnotherThreadMakesOne) {
  Tables tables;
  const void* table = tables.make(0, kKey, kValues);
  ASSERT_NE(table, nullptr);
  std::promise<void> has_begun;
  std::promise<void> may_end;
  tables.device.in_the_next_start = [&] {
    has_begun.set_value();
    may_end.get_future().wait_for(std::chrono::seconds(10));  // not forever if the test fails
  };
  std::thread maker([&] { tables.find(0, key_of(1), kValues); });
  has_begun.get_future().wait();
  EXPECT_EQ(tables.find(0, kKey, kValues), table);
  EXPECT_EQ(tables.find(0, key_of(1), kValues), nullptr);
  EXPECT_EQ(tables.find(0, key_of(2), kValues), nullptr);
  EXPECT_EQ(tables.device.started, 2);
  may_end.set_value();
  maker.join();
}

TEST(FrequencyTables, AreRightAndMadeOnceForManyThreads) {
  // Many devices, so that threads often miss the same table at the same time.
  constexpr int kDevices = 1000;
  constexpr int kKeys = 2;
  Tables tables;
  tables.device.queries_until_complete = 5;
  std::atomic<int> found{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&] {
      for (int device = 0; device < kDevices; ++device) {
        for (int call = 0; call < 4 * kKeys; ++call) {
          const int number = call % kKeys;
          const Values values = values_of(device, number);
          if (const void* table = tables.find(device, key_of(number), values)) {
            ASSERT_EQ(values_at(table), values);
            ++found;
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_GT(found, 0);
  // A thread makes no table while another makes one, so some may still be missing.
  for (int device = 0; device < kDevices; ++device) {
    for (int number = 0; number < kKeys; ++number) {
      tables.find(device, key_of(number), values_of(device, number));
    }
  }
  EXPECT_EQ(tables.device.started, kDevices * kKeys);
}
