# BUILD_BASE for machines without a package index: a base with a wheelhouse in it. The context is the wheelhouse:
#   deploy/airgap/wheelhouse --for site --out WHEELHOUSE
#   docker build -f deploy/docker/wheels.Dockerfile -t cosilo-build-site WHEELHOUSE
#   docker build -f deploy/docker/site.Dockerfile -t cosilo-site --build-arg BUILD_BASE=cosilo-build-site .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
COPY . /wheels
