// Where models and plans are read from.
#ifndef __wasm__
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstring>

#include "model.h"

namespace repvgg {

namespace {

#ifndef __wasm__
class File : public Source {
  public:
    explicit File(const char *path)
        // Without O_NONBLOCK a named pipe would wait for somebody to write into it.
        : file_(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (file_ < 0) refuse_system();
        if (fstat(file_, &before_) != 0) close_and_refuse();
        if (!S_ISREG(before_.st_mode)) {
            close(file_);
            refuse(S_ISDIR(before_.st_mode) ? "is a folder, not a model file"
                                            : "is a device or a pipe, not a model file");
        }
    }
    ~File() override { close(file_); }
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    int64_t size() const override { return before_.st_size; }

    void read(int64_t start, int64_t length, void *to) const override {
        for (int64_t done = 0; done < length;) {
            const ssize_t got =
                pread(file_, static_cast<char *>(to) + done, static_cast<size_t>(length - done), start + done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) refuse_system();
            if (got == 0) refuse_changed();
            done += got;
        }
    }

    void check_unchanged() const override {
        struct stat now;
        if (fstat(file_, &now) != 0) refuse_system();
        if (now.st_size != before_.st_size || now.st_mtime != before_.st_mtime ||
            nanoseconds(now) != nanoseconds(before_))
            refuse_changed();
    }

  private:
    static long nanoseconds(const struct stat &s) {
#ifdef __APPLE__
        return s.st_mtimespec.tv_nsec;
#else
        return s.st_mtim.tv_nsec;
#endif
    }
    [[noreturn]] static void refuse_system() { refuse(std::string("cannot be read (") + std::strerror(errno) + ")"); }
    [[noreturn]] static void refuse_changed() {
        refuse("changed while it was read: write model files beside the old ones, and rename them");
    }
    [[noreturn]] void close_and_refuse() {
        const int reason = errno;
        close(file_);
        errno = reason;
        refuse_system();
    }

    int file_;
    struct stat before_;
};
#endif

class Bytes : public Source {
  public:
    Bytes(const void *bytes, size_t count) : bytes_(static_cast<const char *>(bytes)), count_(count) {}
    int64_t size() const override { return static_cast<int64_t>(count_); }
    void read(int64_t start, int64_t length, void *to) const override {
        if (length > 0) std::memcpy(to, bytes_ + start, static_cast<size_t>(length));
    }

  private:
    const char *bytes_;
    size_t count_;
};

}  // namespace

#ifdef __wasm__
std::unique_ptr<Source> open_file(const char *) { refuse("there are no files here: give bytes"); }
#else
std::unique_ptr<Source> open_file(const char *path) { return std::make_unique<File>(path); }
#endif

std::unique_ptr<Source> open_bytes(const void *bytes, size_t count) { return std::make_unique<Bytes>(bytes, count); }

}  // namespace repvgg
