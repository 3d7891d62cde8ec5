#include "machine.h"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <fstream>
#include <thread>
#include <vector>

#include "repvgg_engine.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace repvgg {

namespace {

/// Folders of a controller's groups, this process's own and those above it, for versions 1 and 2 of cgroups.
std::vector<std::string> groups(const std::string &root, const std::string &controller) {
    std::vector<std::string> folders;
    std::ifstream own(root + "/proc/self/cgroup");
    for (std::string line; std::getline(own, line);) {  // number:controllers:path
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (!controllers.empty() && ("," + controllers + ",").find("," + controller + ",") == std::string::npos)
            continue;
        const std::string mounted = root + "/sys/fs/cgroup/" + controllers;
        std::string path = line.substr(second + 1);
        for (size_t end = path.size(); end != std::string::npos; end = path.rfind('/')) {
            path.resize(end);
            folders.push_back(mounted + path);
        }
    }
    return folders;
}

/// The numbers that a file begins with; none where it says "max".
std::vector<double> numbers(const std::string &path) {
    std::vector<double> found;
    std::ifstream file(path);
    for (double x; file >> x;) found.push_back(x);
    return found;
}

int processors() {
#ifdef __linux__
    cpu_set_t allowed;  // of 1024 processors: where there may be more, the call fails
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return std::min(static_cast<int>(std::thread::hardware_concurrency()), MOST_THREADS);
}

}  // namespace

int available_threads(const std::string &root) {
    double threads = processors();
    for (const std::string &folder : groups(root, "cpu")) {
        const auto limit = numbers(folder + "/cpu.max");
        if (limit.size() == 2) threads = std::min(threads, limit[0] / limit[1]);
        const auto quota = numbers(folder + "/cpu.cfs_quota_us"), period = numbers(folder + "/cpu.cfs_period_us");
        if (!quota.empty() && !period.empty() && quota[0] > 0) threads = std::min(threads, quota[0] / period[0]);
    }
    return std::max(1, static_cast<int>(threads));
}

int64_t available_memory(const std::string &root) {
    double bytes = static_cast<double>(sysconf(_SC_PAGESIZE)) * static_cast<double>(sysconf(_SC_PHYS_PAGES));
    for (const std::string &folder : groups(root, "memory"))
        for (const char *name : {"/memory.max", "/memory.limit_in_bytes"})
            for (const double limit : numbers(folder + name)) bytes = std::min(bytes, limit);
    return static_cast<int64_t>(bytes);
}

}  // namespace repvgg

extern "C" {

int32_t repvgg_available_threads(const char *root) {
    try {
        return repvgg::available_threads(root ? root : "");
    } catch (const std::exception &) {  // not even for a path is there memory
        return 1;
    }
}

int64_t repvgg_available_memory(const char *root) {
    try {
        return repvgg::available_memory(root ? root : "");
    } catch (const std::exception &) {
        return 0;
    }
}
}
