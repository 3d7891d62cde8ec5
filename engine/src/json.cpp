#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>

namespace repvgg {

class JsonReader {
  public:
    JsonReader(const char *at, const char *end) : at_(at), end_(end) {}

    Json whole() {
        Json value = read(0);
        skip_spaces();
        if (at_ != end_) fail();
        return value;
    }

  private:
    [[noreturn]] static void fail() { refuse("is not JSON, or damaged"); }

    void skip_spaces() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) at_++;
    }
    bool take(char c) {
        if (at_ == end_ || *at_ != c) return false;
        at_++;
        return true;
    }
    bool take(const char *word) {
        const size_t length = std::strlen(word);
        if (static_cast<size_t>(end_ - at_) < length || std::memcmp(at_, word, length) != 0) return false;
        at_ += length;
        return true;
    }

    Json read(int depth) {
        if (depth > Json::MOST_DEPTH || ++values_ > Json::MOST_VALUES) refuse("is JSON too deep or too long");
        Json value;
        skip_spaces();
        if (at_ == end_) fail();
        if (*at_ == '{') read_dictionary(value, depth);
        else if (*at_ == '[') read_list(value, depth);
        else if (*at_ == '"') value.kind_ = Json::TEXT, value.text_ = string();
        else if (take("true")) value.kind_ = Json::TRUTH, value.integer_ = 1;
        else if (take("false")) value.kind_ = Json::TRUTH;
        else if (!take("null")) read_number(value);
        return value;
    }

    void read_list(Json &value, int depth) {
        value.kind_ = Json::LIST;
        at_++;
        skip_spaces();
        if (take(']')) return;
        do value.items_.push_back(read(depth + 1));
        while (more(']'));
    }

    void read_dictionary(Json &value, int depth) {
        value.kind_ = Json::DICTIONARY;
        std::vector<std::string> keys;
        std::vector<Json> items;
        at_++;
        skip_spaces();
        if (take('}')) return;
        do {
            skip_spaces();
            keys.push_back(string());
            skip_spaces();
            if (!take(':')) fail();
            items.push_back(read(depth + 1));
        } while (more('}'));
        std::vector<size_t> order(keys.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
        for (const size_t i : order) {
            if (!value.keys_.empty() && value.keys_.back() == keys[i])
                refuse("has the key " + printable(keys[i], 50) + " twice");
            value.keys_.push_back(std::move(keys[i]));
            value.items_.push_back(std::move(items[i]));
        }
    }

    /// After an item: whether another one follows.
    bool more(char closing) {
        skip_spaces();
        if (take(',')) return true;
        if (!take(closing)) fail();
        return false;
    }

    std::string string() {
        std::string text;
        if (!take('"')) fail();
        for (;;) {
            if (at_ == end_ || static_cast<unsigned char>(*at_) < 0x20) fail();
            const char c = *at_++;
            if (c == '"') return text;
            if (c != '\\') text += c;
            else escape(text);
        }
    }

    void escape(std::string &text) {
        if (at_ == end_) fail();
        const char *const from = "\"\\/bfnrt", *const to = "\"\\/\b\f\n\r\t", c = *at_++;
        if (c == 'u') {
            uint32_t code = hex();
            if (code >= 0xd800 && code < 0xdc00 && take("\\u")) {
                const uint32_t low = hex();
                code = low >= 0xdc00 && low < 0xe000 ? 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00) : 0xfffd;
            }
            append(text, code >= 0xd800 && code < 0xe000 ? 0xfffd : code);  // half a pair is no character
            return;
        }
        const char *const found = c ? std::strchr(from, c) : nullptr;
        if (!found) fail();
        text += to[found - from];
    }

    uint32_t hex() {
        uint32_t code = 0;
        for (int i = 0; i < 4; i++) {
            const char c = at_ < end_ ? *at_++ : '\0';
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail();
            code = code * 16 + static_cast<uint32_t>(digit);
        }
        return code;
    }

    static void append(std::string &text, uint32_t code) {
        const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
        if (code < 0x80) return put(code);
        if (code < 0x800) put(0xc0 | code >> 6);
        else if (code < 0x10000) put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 0x3f));
        else put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f)), put(0x80 | (code >> 6 & 0x3f));
        put(0x80 | (code & 0x3f));
    }

    bool is_digit() const { return at_ < end_ && *at_ >= '0' && *at_ <= '9'; }

    /// Not by strtod, which reads as the program's language writes. Exact for numbers of up to 15 digits, as mean and
    /// std are; longer ones may be off by their last bits.
    void read_number(Json &value) {
        const bool negative = take('-');
        if (!is_digit()) fail();
        int64_t whole = 0;
        double digits = 0;
        bool fits = true, fraction = false;
        int power = 0;
        const auto add = [&](int digit) {
            if (whole > (std::numeric_limits<int64_t>::max() - digit) / 10) fits = false;
            else if (fits) whole = whole * 10 + digit;
            digits = digits * 10 + digit;
        };
        while (is_digit()) add(*at_++ - '0');
        if (take('.')) {
            fraction = true;
            if (!is_digit()) fail();
            for (; is_digit(); power--) add(*at_++ - '0');
        }
        if (take('e') || take('E')) {
            fraction = true;
            const bool down = take('-');
            if (!down) take('+');
            if (!is_digit()) fail();
            int exponent = 0;
            while (is_digit()) exponent = std::min(exponent * 10 + (*at_++ - '0'), 100000);
            power += down ? -exponent : exponent;
        }
        if (fits) digits = static_cast<double>(whole);
        const double scale = std::pow(10.0, std::abs(power));
        value.number_ = (negative ? -1 : 1) * (digits == 0 ? 0 : power < 0 ? digits / scale : digits * scale);
        value.kind_ = fits && !fraction ? Json::INTEGER : Json::NUMBER;
        value.integer_ = negative ? -whole : whole;
    }

    const char *at_, *const end_;
    int64_t values_ = 0;
};

Json Json::parse(const char *text, size_t length) { return JsonReader(text, text + length).whole(); }

const Json *Json::find(const std::string &key) const {
    const auto found = std::lower_bound(keys_.begin(), keys_.end(), key);
    return found != keys_.end() && *found == key ? &items_[static_cast<size_t>(found - keys_.begin())] : nullptr;
}

const Json &Json::at(const char *key) const {
    const Json *found = find(key);
    if (!found) refuse(std::string("lacks '") + key + "'");
    return *found;
}

const std::vector<Json> &Json::list() const {
    if (kind_ != LIST) refuse("has " + shown() + " where a list belongs");
    return items_;
}

const std::string &Json::text() const {
    if (kind_ != TEXT) refuse("has " + shown() + " where a text belongs");
    return text_;
}

int64_t Json::integer(int64_t least, int64_t most) const {
    if (kind_ != INTEGER || integer_ < least || integer_ > most)
        refuse("has " + shown() + " where a number from " + std::to_string(least) + " to " + std::to_string(most) +
               " belongs");
    return integer_;
}

double Json::number() const {
    if (kind_ != INTEGER && kind_ != NUMBER) refuse("has " + shown() + " where a number belongs");
    return number_;
}

std::string Json::shown() const {
    switch (kind_) {
        case NOTHING:
            return "null";
        case TRUTH:
            return integer_ ? "true" : "false";
        case INTEGER:
            return std::to_string(integer_);
        case TEXT:
            return "'" + printable(text_, 50) + "'";
        case LIST:
            return "a list";
        case DICTIONARY:
            return "a dictionary";
        case NUMBER:
            break;
    }
    char text[32];
    std::snprintf(text, sizeof text, "%g", number_);
    return text;
}

std::string printable(const std::string &words, size_t most) {
    std::string line;
    for (const char c : words.substr(0, most)) line += c >= ' ' && c <= '~' ? c : '?';
    return words.size() > most ? line + "..." : line;
}

}  // namespace repvgg
