# syntax=docker/dockerfile:1
#
#   docker build -t sgld .
#   docker run --rm --gpus all -v sgld-cache:/cache -v "$PWD/outputs:/outputs" sgld generate --prompt "A sunset"
#   docker run --rm --gpus all -v sgld-cache:/cache -v sgld-data:/data -p 127.0.0.1:30000:30000 \
#       sgld serve --host 0.0.0.0 --model-path Qwen/Qwen-Image
#
# With several GPUs add `--num-gpus 4` and the like to sgld's arguments (docs/parallel.md), and `--shm-size=1g --ulimit
# memlock=-1` to docker's, as NCCL may keep there what GPUs exchange. Else --shm-size may stay as it is: the tensor queue is
# a memfd. Without --gpus it runs on the CPU. A folder mounted to /outputs must be writable for user 1000.

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# With a compiler: torch.compile needs one, and Triton builds the launchers of its kernels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
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

# Models of the hub and what sgld learns of models (/cache), and jobs with their results (/data), outlive the container.
# 1000 is `ubuntu` in the base image.
RUN mkdir -p /cache/huggingface /cache/sgl_diffusion /data /outputs && chown -R 1000:1000 /cache /data /outputs
ENV HF_HOME=/cache/huggingface \
    SGLANG_DIFFUSION_CACHE_ROOT=/cache/sgl_diffusion \
    XDG_DATA_HOME=/data
VOLUME ["/cache", "/data"]
USER 1000:1000
# Outputs go to outputs/ in the working folder.
WORKDIR /

# The default port of the HTTP server.
EXPOSE 30000

# Of `sgld serve` on the default port, whose model may take long to come from the hub; it says nothing of other commands.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:30000/health')"]

ENTRYPOINT ["sgld"]
CMD ["--help"]
