/* The engine from C: every algorithm of many convolutions against sums in double precision. Prints what it checked; 1
 * where one is off.
 *
 *   cc check.c -lrepvgg_engine -lm && ./a.out
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "repvgg_engine.h"

static uint64_t state = 1;

static float random_float(void) { /* a triangle between -1 and 1 */
    double sum = 0;
    for (int i = 0; i < 2; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(state >> 11) / 9007199254740992.0 - 0.5;
    }
    return (float)sum;
}

static float *random_floats(size_t n, float scale) {
    float *values = malloc(n * sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = scale * random_float();
    return values;
}

/* Output (n, o, y, x) of a convolution; in *size the root of the sum of its squared products, in *plain the same sum in
 * float. */
static double convolve(const repvgg_layer *l, const float *images, int height, int width, int n, int o, int y, int x,
                       double *size, double *plain) {
    const int depth = l->in_channels / l->groups, group = o / (l->out_channels / l->groups);
    double sum = l->bias[o], squares = 0;
    float rounded = l->bias[o];
    for (int c = 0; c < depth; c++)
        for (int i = 0; i < l->kernel[0]; i++)
            for (int j = 0; j < l->kernel[1]; j++) {
                const int row = y * l->stride[0] - l->padding[0] + i * l->dilation[0];
                const int column = x * l->stride[1] - l->padding[1] + j * l->dilation[1];
                if (row < 0 || row >= height || column < 0 || column >= width) continue;
                const float pixel =
                    images[(((size_t)n * l->in_channels + group * depth + c) * height + row) * width + column];
                const float weight = l->weight[(((size_t)o * depth + c) * l->kernel[0] + i) * l->kernel[1] + j];
                const double product = (double)pixel * weight;
                rounded += pixel * weight;
                sum += product;
                squares += product * product;
            }
    *size = sqrt(squares);
    *plain = l->relu && rounded < 0 ? 0 : rounded;
    return l->relu && sum < 0 ? 0 : sum;
}

/* How many times the rounding of plain sums in float an algorithm's may be. */
static double times(const char *algorithm) {
    const char *names[] = {"direct", "F2", "F4", "F5", "F6", "F7"};
    const double times[] = {4, 6, 20, 40, 80, 250};
    for (int i = 0; i < 6; i++)
        if (!strcmp(names[i], algorithm)) return times[i];
    return 0;
}

static int check(const char *isa, int stride, int dilation, int groups, int in, int out, int height, int width, int n) {
    char error[256] = "";
    repvgg_layer layer = {
        .op = REPVGG_CONV, .in_channels = in * groups, .out_channels = out * groups, .groups = groups, .relu = n % 2};
    for (int i = 0; i < 2; i++)
        layer.kernel[i] = 3, layer.stride[i] = stride, layer.padding[i] = layer.dilation[i] = dilation;
    float *weight = random_floats((size_t)out * groups * in * 9, sqrtf(2.0f / (9 * in))),
          *bias = random_floats(out * groups, 0.1f);
    float *pixels = random_floats((size_t)n * in * groups * height * width, 1);
    layer.weight = weight, layer.bias = bias;
    const repvgg_options options = {.threads = 2, .isa = isa};
    const repvgg_images images = {.data = pixels, .n = n, .height = height, .width = width};
    repvgg_net *net = repvgg_create(&layer, 1, &options, error, sizeof error);
    int32_t shape[3];
    if (!net || repvgg_output_shape(net, height, width, shape, error, sizeof error)) return puts(error), 1;
    const size_t count = (size_t)n * shape[0] * shape[1] * shape[2];
    float *output = malloc(count * sizeof *output);
    int wrong = 0;
    const char *algorithm;
    for (int a = 0; (algorithm = repvgg_algorithm(net, 0, a)); a++) {
        if (repvgg_choose(net, 0, algorithm, error, sizeof error)) return puts(error), 1;
        if (repvgg_run(net, &images, output, error, sizeof error)) return puts(error), 1;
        double squares = 0, sizes = 0, roundings = 0;
        for (size_t i = 0; i < count; i++) {
            const int x = i % shape[2], y = i / shape[2] % shape[1], o = i / shape[2] / shape[1] % shape[0];
            double size, plain;
            const double exact =
                convolve(&layer, pixels, height, width, i / shape[2] / shape[1] / shape[0], o, y, x, &size, &plain);
            squares += (output[i] - exact) * (output[i] - exact);
            roundings += (plain - exact) * (plain - exact);
            sizes += size * size;
        }
        const double found = sqrt(squares / sizes), own = fmax(sqrt(roundings / sizes), FLT_EPSILON);
        const int ok = found < times(algorithm) * own;
        wrong |= !ok;
        printf("%s stride %d dilation %d groups %d %3d -> %3d channels %dx%dx%d %-6s %.1e%s\n", isa, stride, dilation,
               groups, in, out, n, height, width, algorithm, found, ok ? "" : " WRONG");
    }
    free(output), free(weight), free(bias), free(pixels);
    repvgg_destroy(net);
    return wrong;
}

int main(void) {
    char sets[128];
    snprintf(sets, sizeof sets, "%s", repvgg_instruction_sets());
    int wrong = 0;
    for (char *isa = strtok(sets, " "); isa; isa = strtok(NULL, " ")) {
        if (!strcmp(isa, "bf16")) continue;
        wrong |= check(isa, 1, 1, 1, 16, 48, 14, 14, 2) | check(isa, 2, 1, 1, 24, 40, 15, 22, 1) |
                 check(isa, 1, 2, 1, 20, 50, 17, 13, 1);
        wrong |= check(isa, 1, 1, 2, 12, 20, 9, 28, 5) | check(isa, 2, 1, 1, 3, 64, 33, 31, 1) |
                 check(isa, 1, 1, 1, 65, 7, 5, 8, 4);
    }
    return wrong;
}
