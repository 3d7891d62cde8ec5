/* The class of a photo, from C.
 *
 *   D=$(python -c "import repvgg_engine; print(repvgg_engine.__path__[0])")
 *   cc engine/examples/classify.c -I"$D" -L"$D" -lrepvgg_engine -Wl,-rpath,"$D" -o classify
 *   ./classify a0.safetensors photo.ppm [a0.plan.json]
 *
 * PPM is the simplest of image files; ImageMagick, ffmpeg and GIMP write it.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

#include "repvgg_engine.h"

static int fail(const char *reason) {
    fprintf(stderr, "classify: %s\n", reason);
    return 2;
}

/* The next number of a PPM's header, where comments may lie between them; -1 where there is none. */
static int read_number(FILE *file) {
    int c, number;
    while (isspace(c = fgetc(file)) || c == '#')
        while (c == '#' && (c = fgetc(file)) != '\n' && c != EOF) c = '#';
    ungetc(c, file);
    return fscanf(file, "%9d", &number) == 1 ? number : -1;
}

/* The pixels of a binary PPM, uint8 [height, width, 3]; NULL where it is none. */
static uint8_t *read_ppm(const char *path, int *height, int *width) {
    FILE *file = fopen(path, "rb");
    uint8_t *pixels = NULL;
    if (!file) return NULL;
    const int is_ppm = fgetc(file) == 'P' && fgetc(file) == '6';
    *width = read_number(file), *height = read_number(file);
    if (is_ppm && read_number(file) == 255 && fgetc(file) != EOF && *width > 0 && *height > 0 && *width <= 10000 &&
        *height <= 10000) {
        const size_t bytes = (size_t)*width * *height * 3;
        pixels = malloc(bytes);
        if (pixels && fread(pixels, 1, bytes, file) != bytes) {
            free(pixels);
            pixels = NULL;
        }
    }
    fclose(file);
    return pixels;
}

/* Print a class's name on a line of its own. It is a stranger's word, which must not steer the terminal. */
static void show(const char *name) {
    for (; *name; name++) putchar((unsigned char)*name < 0x20 || *name == 0x7f ? '?' : *name);
    putchar('\n');
}

int main(int count, char **words) {
    char error[500] = "there is not enough memory";
    if (count < 3 || count > 4) return fail("usage: classify MODEL.safetensors PHOTO.ppm [PLAN.json]");

    repvgg_open_options options = {.size = sizeof options, .plan = count > 3 ? words[3] : NULL};
    repvgg_net *net = repvgg_open(words[1], &options, error, sizeof error);
    if (!net) return fail(error);
    repvgg_description about = {.size = sizeof about};
    repvgg_describe(repvgg_net_model(net), &about);
    int pools = 0;
    for (int i = 0; i < about.layer_count - 1; i++) pools |= about.layers[i].op == REPVGG_POOL;
    if (!pools) return fail("a backbone, which gives no labels: train a head on it first");

    int height, width;
    uint8_t *pixels = read_ppm(words[2], &height, &width);
    if (!pixels || about.channels != 3) return fail("no photo that can be read, or not a model of colours");
    uint8_t *input = malloc((size_t)about.height * about.width * 3);
    if (!input || repvgg_prepare(&about, pixels, height, width, input, error, sizeof error)) return fail(error);

    int32_t shape[3];
    repvgg_images images = {.data = input, .bytes = 1, .n = 1, .height = about.height, .width = about.width};
    images.scale = about.scale, images.shift = about.shift;
    if (repvgg_output_shape(net, about.height, about.width, shape, error, sizeof error)) return fail(error);
    float *logits = malloc(sizeof *logits * shape[0] * shape[1] * shape[2]);
    if (!logits || repvgg_run(net, &images, logits, error, sizeof error)) return fail(error);

    int best = 0;
    for (int i = 1; i < shape[0]; i++)
        if (logits[i] > logits[best]) best = i;
    if (best < about.class_count) show(about.classes[best]);
    else printf("class %d\n", best);
    free(logits), free(input), free(pixels);
    repvgg_destroy(net);
    return 0;
}
