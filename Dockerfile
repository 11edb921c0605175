# syntax=docker/dockerfile:1
# A server on a CPU with the embedded models:  docker build -t nbest . && docker run --rm -p 8000:8000 nbest

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/nbest
ENV PATH=/opt/nbest/bin:$PATH
# The packages are a layer of their own, kept until the pins change.
COPY requirements/cpu.txt requirements/cpu.txt
RUN pip install --no-deps "$(grep '^torch==' requirements/cpu.txt)" --index-url https://download.pytorch.org/whl/cpu \
 && pip install --no-deps -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY reranker reranker
COPY training training
RUN pip install --no-deps --no-build-isolation . && NBEST_CACHE=/opt/nbest/cache nbest prepare

FROM python:3.11-slim
# vLLM's CPU kernels want OpenMP, and its threads are bound to NUMA nodes.
# hadolint ignore=DL3008  # Debian keeps only the newest build of a package, so a pinned one soon cannot be had
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 nbest
COPY --from=build /opt/nbest /opt/nbest
ENV PATH=/opt/nbest/bin:$PATH NBEST_CACHE=/opt/nbest/cache NBEST_HOST=0.0.0.0
USER 10001
WORKDIR /home/nbest
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=3s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["nbest"]
CMD ["serve"]
