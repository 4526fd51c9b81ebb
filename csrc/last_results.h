// A cache of the last few results of a slow function. Models with two sets of frequencies alternate
// between them from layer to layer.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

namespace rope {

template <typename Key, typename Result>
class LastResults {
 public:
  // The result for a key, from make() if it is not cached. The reference stays valid until kCount
  // other keys were inserted.
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
