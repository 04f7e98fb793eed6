# Fashion-MNIST for the demo, from Debian's package dataset-fashion-mnist, and the script that deals it out to four sites. An image of its
# own, so that a site's image carries nobody's data. Build from the repository's root. Xiao, Rasul and Vollgraf, arXiv 1708.07747; MIT.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS data
RUN if [ ! -d /usr/share/datasets/fashion-mnist ]; then \
        apt-get update -qq && apt-get install -y -qq --no-install-recommends dataset-fashion-mnist; \
    fi

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="cosilo-demo-data" \
      org.opencontainers.image.description="Fashion-MNIST, dealt out to the sites of a demo" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
      org.opencontainers.image.version="${VERSION}"
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin cosilo \
 && for site in northgate riverside lakeview st-anna; do install -d -o cosilo -g cosilo -m 0755 "/parts/$site"; done
COPY --from=data /usr/share/datasets/fashion-mnist /usr/share/datasets/fashion-mnist
COPY --from=data /usr/share/doc/dataset-fashion-mnist/copyright /usr/share/doc/dataset-fashion-mnist/copyright
COPY deploy/docker/deal.py /opt/deal.py
USER 10001:10001
CMD ["python3", "-I", "/opt/deal.py"]
