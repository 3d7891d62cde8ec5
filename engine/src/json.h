// A small reader of JSON, for the headers of strangers' files: what it takes is bounded, and what it refuses is one
// line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "refuse.h"

namespace repvgg {

class Json {
  public:
    enum Kind { NOTHING, TRUTH, INTEGER, NUMBER, TEXT, LIST, DICTIONARY };

    /// Throws std::invalid_argument for what is no JSON, is deeper than MOST_DEPTH, or has more than MOST_VALUES
    /// values.
    static Json parse(const char *text, size_t length);
    static constexpr int MOST_DEPTH = 64;
    static constexpr int64_t MOST_VALUES = 1 << 20;

    Kind kind() const { return kind_; }
    bool is_nothing() const { return kind_ == NOTHING; }
    /// Null where this is no dictionary, or has no such key.
    const Json *find(const std::string &key) const;
    /// These throw std::invalid_argument where the value is of another kind.
    const Json &at(const char *key) const;
    const std::vector<Json> &list() const;
    const std::string &text() const;
    int64_t integer(int64_t least, int64_t most) const;
    double number() const;
    /// The value as a few printable characters, for a message.
    std::string shown() const;

  private:
    friend class JsonReader;
    Kind kind_ = NOTHING;
    int64_t integer_ = 0;
    double number_ = 0;
    std::string text_;
    std::vector<Json> items_;        // of a dictionary: the values, in the order of keys
    std::vector<std::string> keys_;  // in order
};

/// A stranger's words on one printable line, cut where they are long.
std::string printable(const std::string &words, size_t most = 200);

}  // namespace repvgg
