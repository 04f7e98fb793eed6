# A site: build from the repository's root,
#   docker build -f deploy/docker/site.Dockerfile -t cosilo-site .
# for a GPU, with torch's build for its CUDA (the driver is the host's; NVIDIA's container toolkit brings it in):
#   docker build -f deploy/docker/site.Dockerfile -t cosilo-site:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# EXTRAS: dicom, nifti, digits, separated by commas. BASE and BUILD_BASE: see coordinator.Dockerfile.
ARG BASE=python:3.11-slim-bookworm
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
COPY constraints.txt /src/
COPY common /src/common
COPY client /src/client
COPY deploy/docker/install-cosilo /src/
RUN TORCH_INDEX="${TORCH_INDEX}" EXTRAS="${EXTRAS}" /src/install-cosilo client

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="cosilo-site" \
      org.opencontainers.image.description="Site daemon of a Cosilo federation" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/cosilo --shell /usr/sbin/nologin cosilo \
 && install -d -o cosilo -g cosilo -m 0700 /var/lib/cosilo /invitation
COPY --from=build /opt/cosilo /opt/cosilo
# NVIDIA_*: what the container toolkit hands in where a GPU is asked for; without one they do nothing.
ENV PATH=/opt/cosilo/bin:$PATH HOME=/tmp XDG_CACHE_HOME=/tmp/cache CUDA_CACHE_PATH=/tmp/cache/cuda \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    COSILO_SITE_CONFIG=/etc/cosilo/site.toml PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME ["/var/lib/cosilo"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-ISc", "import urllib.request as u; u.urlopen('http://127.0.0.1:9465/healthz', timeout=4)"]
CMD ["cosilo-site", "serve"]
