// A thread's last few results of a slow function, such as a row of powers: models with two sets of
// frequencies switch between them at every layer.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

namespace rope {

template <typename Key, typename Result>
class LastResults {
 public:
  // Returns the result for a key, from make() if it is not among the last kCount. It stays where it
  // is until kCount other keys have been asked for.
  template <typename Make>
  const Result& find(const Key& key, const Make& make) {
    for (const auto& entry : entries_) {
      if (entry.has_value() && entry->first == key) {
        return entry->second;
      }
    }
    auto& oldest = entries_[next_];
    oldest = std::pair<Key, Result>(key, make());
    next_ = (next_ + 1) % kCount;
    return oldest->second;
  }

 private:
  static constexpr std::size_t kCount = 4;

  std::array<std::optional<std::pair<Key, Result>>, kCount> entries_;
  std::size_t next_ = 0;
};

}  // namespace rope
