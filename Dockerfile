# syntax=docker/dockerfile:1
#
#   docker build -t sgld .
#   docker run --rm --gpus all -v sgld-cache:/cache -v "$PWD/outputs:/outputs" sgld generate --prompt "A sunset"
#
# With several GPUs, add `--num-gpus 4` and the like to sgld's own arguments. Without --gpus it runs on the CPU. A folder mounted to /outputs must be writable for user 1000. The tensor queue is a
# memfd, so --shm-size may stay as it is.

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/sgld
ENV PATH=/opt/sgld/bin:$PATH \
    PYTHONUNBUFFERED=1

# The dependencies are a layer of their own: it is made again when pyproject.toml changes, not when the code does.
WORKDIR /build
RUN --mount=type=bind,source=pyproject.toml,target=pyproject.toml \
    --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
               print(*project["dependencies"], sep="\n")' > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt

# rw: the build writes beside the sources; that is thrown away.
RUN --mount=type=bind,target=.,rw \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps .

# Models of the hub, and what sgld learns of models, outlive the container. 1000 is `ubuntu` in the base image.
RUN mkdir -p /cache/huggingface /cache/sgl_diffusion /outputs && chown -R 1000:1000 /cache /outputs
ENV HF_HOME=/cache/huggingface \
    SGLANG_DIFFUSION_CACHE_ROOT=/cache/sgl_diffusion
VOLUME /cache
USER 1000:1000
# Outputs go to outputs/ in the working folder.
WORKDIR /

# The default port of the HTTP server.
EXPOSE 30000

# There is no server to ask yet, so this says that the program starts; it becomes a request to /health.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s --retries=3 CMD ["sgld", "version"]

ENTRYPOINT ["sgld"]
CMD ["--help"]
