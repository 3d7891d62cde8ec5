/* The C interface of the engine: a plain stack of convolutions, on the CPU.
 *
 *   repvgg_net *net = repvgg_open("a0.safetensors", NULL, error, sizeof error);   (examples/classify.c is whole)
 *   repvgg_run(net, &images, output, error, sizeof error);
 *   repvgg_destroy(net);
 *
 * Functions that can fail return 0 (or a net) on success, and otherwise -1 (or NULL) with one line in `error`. One net
 * may be used by several threads at once. NULL where a thing belongs is an error, and nothing worse.
 */
#ifndef REPVGG_ENGINE_H
#define REPVGG_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define REPVGG_API __attribute__((visibility("default")))

enum { REPVGG_CONV = 0, REPVGG_SQUEEZE_EXCITE = 1, REPVGG_POOL = 2, REPVGG_MAX_POOL = 3 };

/* One operator. A linear layer is a 1x1 convolution after the pool; a max-pool has channels, kernel, stride, padding.
 * float32, contiguous, in PyTorch's order. */
typedef struct {
    int32_t op;
    int32_t in_channels, out_channels; /* squeeze_excite: channels, and those of its hidden layer */
    int32_t kernel[2], stride[2], padding[2], dilation[2], groups;
    int32_t relu;
    float largest_input; /* conv: as far as calibration knows it, for products of 8 bits; otherwise 0 */
    const float *weight,
        *bias; /* conv: [out, in / groups, kh, kw], [out]; squeeze_excite: [hidden, channels], [hidden] */
    const float *weight2, *bias2; /* squeeze_excite: [channels, hidden], [channels] */
} repvgg_layer;

/* What products may be of, beside float32. */
enum { REPVGG_FP32 = 0, REPVGG_BF16 = 1, REPVGG_INT16 = 2, REPVGG_INT8 = 3 };

typedef struct {
    int32_t threads;   /* that compute, the caller among them */
    int32_t pin;       /* each further thread to a processor of its own */
    int32_t precision; /* REPVGG_FP32, ... */
    const char *isa;   /* "avx512", "avx2", "portable"; NULL or "": the best that the processor has */
} repvgg_options;

/* n images: float32 [n, channels, height, width], or, where `bytes` is set, uint8 [n, height, width, channels] that
 * become byte * scale[c] + shift[c]. */
typedef struct {
    const void *data;
    int32_t bytes, n, height, width;
    const float *scale, *shift;
} repvgg_images;

typedef struct repvgg_net repvgg_net;

/* Of this interface; a program compares what it was compiled with and what it runs with. sizes (may be NULL): bytes of
 * repvgg_layer, repvgg_options and repvgg_images as the library has them. */
#define REPVGG_ABI_VERSION 3
REPVGG_API int32_t repvgg_abi_version(size_t sizes[3]);

/* ---- model files: safetensors in deploy form, as `repvgg convert` writes them ---- */

typedef struct repvgg_model repvgg_model;

/* A file, or its bytes, which may go afterwards. Files of strangers are safe to read. */
REPVGG_API repvgg_model *repvgg_read(const char *path, char *error, size_t size);
REPVGG_API repvgg_model *repvgg_read_bytes(const void *bytes, size_t count, char *error, size_t size);
REPVGG_API void repvgg_free(repvgg_model *model);

/* What a model file says. All pointers are the model's. */
typedef struct {
    size_t size; /* sizeof(repvgg_description), set by the caller: a later library fills in no more than that */
    const repvgg_layer *layers;
    int32_t layer_count;
    int32_t channels, height, width; /* of the input */
    int32_t resize;                  /* of an image's short side, before its centre is cropped */
    const char *interpolation;       /* "nearest", "bilinear", "bicubic" */
    const double *mean, *std;        /* of each channel, where pixels are 0 to 1 */
    const float *scale, *shift;      /* the same for repvgg_images */
    const char *const *classes;      /* names, or NULL */
    int32_t class_count;
} repvgg_description;
REPVGG_API int repvgg_describe(const repvgg_model *model, repvgg_description *description);

/* The resized centre of a picture, as Pillow resizes. pixels: uint8 [height, width, channels]; out: the same, of the
 * size that is described. */
REPVGG_API int repvgg_prepare(const repvgg_description *description, const uint8_t *pixels, int32_t height,
                              int32_t width, uint8_t *out, char *error, size_t size);

/* Zero is the default of each. */
typedef struct {
    size_t size;           /* sizeof(repvgg_open_options), set by the caller */
    const char *plan;      /* the path of a plan (python -m repvgg_engine plan FILE), by which each layer is computed */
    const char *plan_text; /* or the plan itself */
    const char *isa;       /* as in repvgg_options; a plan has its own */
    int32_t threads;       /* 0: repvgg_available_threads */
    int32_t pin;
    int32_t features; /* the last feature map instead of logits */
} repvgg_open_options;

/* A net of a model file, which it keeps. options: NULL for the defaults. Without a plan, 3x3 convolutions with enough
 * channels are computed by F2: an error of at most twice the direct algorithm's; a plan is faster. */
REPVGG_API repvgg_net *repvgg_open(const char *path, const repvgg_open_options *options, char *error, size_t size);
/* The same of a model at hand, which is the net's from then on: freed with it, or at once where this fails. */
REPVGG_API repvgg_net *repvgg_open_model(repvgg_model *model, const repvgg_open_options *options, char *error,
                                         size_t size);
/* Of a net that was opened; NULL of one that was created. */
REPVGG_API const repvgg_model *repvgg_net_model(const repvgg_net *net);

/* ---- nets of layers at hand ---- */

/* Weights are not copied: they must outlive the net. */
REPVGG_API repvgg_net *repvgg_create(const repvgg_layer *layers, int32_t count, const repvgg_options *options,
                                     char *error, size_t size);
REPVGG_API void repvgg_destroy(repvgg_net *net);

/* Channels, height and width of the output for images of that size. */
REPVGG_API int repvgg_output_shape(const repvgg_net *net, int32_t height, int32_t width, int32_t shape[3], char *error,
                                   size_t size);

/* output: float32 [n, channels, height, width], of the shape above. */
REPVGG_API int repvgg_run(repvgg_net *net, const repvgg_images *images, float *output, char *error, size_t size);

/* How a convolution is computed, for any number of images: "direct", or by Winograd's algorithm with tiles of m x m
 * outputs, "F2", "F4", ...; where products may be of another precision also "direct bf16" or "direct int16", which is
 * then the default, "F2 bf16", ...; of int8 "direct int8" and "F2 int8" for layers whose largest input is known, and
 * those of int16. An algorithm that does not fit the layer is an error. By the same algorithms an image gives the same
 * bits in any batch, on any number of threads, and, of one build of this library, on any machine with the instruction
 * set. */
REPVGG_API int repvgg_choose(repvgg_net *net, int32_t layer, const char *algorithm, char *error, size_t size);

/* The instruction set that the net runs on, as in repvgg_options. */
REPVGG_API const char *repvgg_isa(const repvgg_net *net);

/* The i-th algorithm that fits a layer, or NULL; and the bytes of its weights. */
REPVGG_API const char *repvgg_algorithm(const repvgg_net *net, int32_t layer, int32_t i);
REPVGG_API int64_t repvgg_weight_bytes(const repvgg_net *net, int32_t layer, const char *algorithm);

/* Seconds that threads have computed in each layer since the last call of this function; none before the first. */
REPVGG_API void repvgg_profile(repvgg_net *net, double *seconds);

/* How equally threads share a convolution of such images: returns how many pieces it is cut into, and notes of as many
 * as there is room for the multiplications, in vectors. */
REPVGG_API int repvgg_work(repvgg_net *net, int32_t layer, const repvgg_images *images, int64_t *work, int32_t room,
                           char *error, size_t size);

/* Instruction sets that this processor has, best first, separated by spaces; "bf16" among them where it multiplies
 * bfloat16. */
REPVGG_API const char *repvgg_instruction_sets(void);

/* How many threads can compute at once: processors of this process, no more than its container's quota of time. And
 * bytes of memory: the machine's, or the container's limit. root: NULL; or a folder in place of /, for tests. */
REPVGG_API int32_t repvgg_available_threads(const char *root);
REPVGG_API int64_t repvgg_available_memory(const char *root);

#ifdef __cplusplus
}
#endif
#endif
