# A CPU image that trains and predicts; the folder of images and runs is mounted at /data:
#
#     docker build -t repvgg .
#     docker run --rm --user "$(id -u)" -e HOME=/tmp -v "$PWD:/data" repvgg train --arch repvgg_a0 --data photos --out runs/photos
#     docker run --rm --user "$(id -u)" -e HOME=/tmp -v "$PWD:/data" repvgg predict runs/photos photo.jpg
#
# The index's PyTorch on Linux brings NVIDIA's libraries, gigabytes of them. For one without, name the index of CPU builds that
# PyTorch's page "Get started" gives: docker build --build-arg INDEX=... -t repvgg .
FROM python:3.12-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY engine engine
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./engine
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG INDEX=""
# Which PyTorch it is, pyproject.toml says.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${INDEX:+--index-url "$INDEX"} "torch>=2.11" "torchvision>=0.26"
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(ls /wheels/repvgg-[0-9]*.whl)[train]" /wheels/repvgg_engine-*.whl && rm -r /wheels
RUN useradd --create-home --uid 1000 someone
USER 1000
WORKDIR /data
ENTRYPOINT ["repvgg"]
CMD ["--help"]
