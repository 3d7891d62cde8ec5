/* The C interface of the engine: a plain stack of convolutions, on the CPU.
 *
 *   repvgg_net *net = repvgg_create(layers, count, &options, error, sizeof error);
 *   repvgg_run(net, &images, output, error, sizeof error);
 *   repvgg_destroy(net);
 *
 * Functions that can fail return 0 (or a net) on success, and otherwise -1 (or NULL) with one line in `error`. One net
 * may be used by several threads at once. Weights are not copied: they must outlive the net.
 */
#ifndef REPVGG_ENGINE_H
#define REPVGG_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define REPVGG_API __attribute__((visibility("default")))

enum { REPVGG_CONV = 0, REPVGG_SQUEEZE_EXCITE = 1, REPVGG_POOL = 2 };

/* One operator. A linear layer is a 1x1 convolution after the pool. float32, contiguous, in PyTorch's order. */
typedef struct {
    int32_t op;
    int32_t in_channels, out_channels; /* squeeze_excite: channels, and those of its hidden layer */
    int32_t kernel[2], stride[2], padding[2], dilation[2], groups;
    int32_t relu;
    const float *weight,
        *bias; /* conv: [out, in / groups, kh, kw], [out]; squeeze_excite: [hidden, channels], [hidden] */
    const float *weight2, *bias2; /* squeeze_excite: [channels, hidden], [channels] */
} repvgg_layer;

/* What products may be of, beside float32. */
enum { REPVGG_FP32 = 0, REPVGG_BF16 = 1, REPVGG_INT16 = 2 };

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
#define REPVGG_ABI_VERSION 1
REPVGG_API int32_t repvgg_abi_version(size_t sizes[3]);

REPVGG_API repvgg_net *repvgg_create(const repvgg_layer *layers, int32_t count, const repvgg_options *options,
                                     char *error, size_t size);
REPVGG_API void repvgg_destroy(repvgg_net *net);

/* Channels, height and width of the output for images of that size. */
REPVGG_API int repvgg_output_shape(const repvgg_net *net, int32_t height, int32_t width, int32_t shape[3], char *error,
                                   size_t size);

/* output: float32 [n, channels, height, width], of the shape above. */
REPVGG_API int repvgg_run(repvgg_net *net, const repvgg_images *images, float *output, char *error, size_t size);

/* How a convolution is computed, for any number of images: "direct", or by Winograd's algorithm with tiles of m x m
 * outputs, "F2", "F4",
 * ...; where products may be of another precision also "direct bf16" or "direct int16", which is then the default,
 * "F2 bf16", ... An algorithm that does not fit the layer is an error. By the same algorithms an image gives the same
 * bits in any batch, on any number of threads, and on any machine with the instruction set. */
REPVGG_API int repvgg_choose(repvgg_net *net, int32_t layer, const char *algorithm, char *error, size_t size);

/* The instruction set that the net runs on, as in repvgg_options. */
REPVGG_API const char *repvgg_isa(const repvgg_net *net);

/* The i-th algorithm that fits a layer, or NULL; and the bytes of its weights. */
REPVGG_API const char *repvgg_algorithm(const repvgg_net *net, int32_t layer, int32_t i);
REPVGG_API int64_t repvgg_weight_bytes(const repvgg_net *net, int32_t layer, const char *algorithm);

/* Seconds that threads have spent in each layer since the last call of this function. */
REPVGG_API void repvgg_profile(repvgg_net *net, double *seconds);

/* Instruction sets that this processor has, best first, separated by spaces; "bf16" among them where it multiplies
 * bfloat16. */
REPVGG_API const char *repvgg_instruction_sets(void);

#ifdef __cplusplus
}
#endif
#endif
