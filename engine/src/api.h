// What stands behind the names of the C interface; every exception becomes one line of text.
#pragma once

#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "model.h"
#include "net.h"

struct repvgg_model {
    explicit repvgg_model(std::unique_ptr<repvgg::Model> read) : model(std::move(read)) {
        for (const std::string &name : model->classes) classes.push_back(name.c_str());
    }
    const std::unique_ptr<repvgg::Model> model;
    std::vector<const char *> classes;
};

struct repvgg_net {
    std::unique_ptr<repvgg_model> model;  // of which the layers are, where the net was opened
    repvgg::Net net;
};

namespace repvgg {

/// where: what the words are about, or null. memory: what there may not be enough memory for.
template <class Work>
int guarded(char *error, size_t size, const char *where, const char *memory, const Work &work) {
    const auto say = [&](const char *text, const char *more = "") {
        if (error && size) std::snprintf(error, size, "%s%s%s%s", where ? where : "", where ? ": " : "", text, more);
        return -1;
    };
    try {
        work();
        return 0;
    } catch (const std::bad_alloc &) {
        return say("there is not enough memory for ", memory);
    } catch (const std::exception &caught) {
        return say(caught.what());
    }
}

}  // namespace repvgg
