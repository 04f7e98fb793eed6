# The coordinator, and the admin's `cosilo`: build from the repository's root,
#   docker build -f deploy/docker/coordinator.Dockerfile -t cosilo-coordinator .
# BASE runs it; BUILD_BASE builds it and may bring what a machine without a registry needs (see wheels.Dockerfile). Both must have the same
# Python. TORCH_INDEX is where torch comes from beside the package index: its CPU build, several GB smaller than the one with CUDA.
ARG BASE=python:3.11-slim-bookworm
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /src/
COPY common /src/common
COPY server /src/server
COPY deploy/docker/install-cosilo /src/
RUN TORCH_INDEX="${TORCH_INDEX}" /src/install-cosilo server

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="cosilo-coordinator" \
      org.opencontainers.image.description="Coordinator of a Cosilo federation, and the admin's command line" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The folders that volumes are mounted on: a new named volume takes their owner and mode.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/cosilo --shell /usr/sbin/nologin cosilo \
 && install -d -o cosilo -g cosilo -m 0700 /var/lib/cosilo /var/lib/cosilo-admin /var/lib/cosilo-ca /invitations
COPY --from=build /opt/cosilo /opt/cosilo
# Read-only at run time: nothing but volumes and a tmpfs at /tmp is ever written.
ENV PATH=/opt/cosilo/bin:$PATH HOME=/tmp XDG_CACHE_HOME=/tmp/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME ["/var/lib/cosilo"]
EXPOSE 7443 7444
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-ISc", "import urllib.request as u; u.urlopen('http://127.0.0.1:9464/readyz', timeout=4)"]
CMD ["cosilo-coordinator", "serve", "--config", "/etc/cosilo/coordinator.toml"]
