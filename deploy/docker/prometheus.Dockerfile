# A stand-in for prom/prometheus where no image registry is reached: Debian's own package, under the same user and paths. CI uses it.
#   docker build -f deploy/docker/prometheus.Dockerfile -t cosilo-prometheus deploy/docker
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN if [ ! -x /usr/bin/prometheus ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; fi \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -o nobody -g nogroup /prometheus
USER 65534:65534
VOLUME ["/prometheus"]
ENTRYPOINT ["/usr/bin/prometheus"]
