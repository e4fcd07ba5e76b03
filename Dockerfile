# kvx serve, without torch:
#
#   docker build -t kvx .
#   docker run --read-only -v ./artifacts:/models:ro -p 5000:5000 kvx
#
# EXTRAS are extras of pyproject.toml. cpu,serve is the least; gpu or cuda takes the place of cpu.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=cpu,serve,tokenizers,bpe
# For kvx's own operators, which are compiled as it is installed.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/kvx
WORKDIR /source
COPY . .
# Modules are compiled here, since nothing can be written later. Unchecked hashes hold whatever becomes of the files' times.
RUN pip --python /opt/kvx/bin/python install --no-cache-dir --no-compile --constraint constraints.txt ".[${EXTRAS}]" \
    && /opt/kvx/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/kvx/lib

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 kvx \
    && useradd --uid 10001 --gid kvx --no-create-home --home-dir / --shell /usr/sbin/nologin kvx
COPY --from=build /opt/kvx /opt/kvx
ENV PATH=/opt/kvx/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    KVX_BUNDLES=/models
USER 10001:10001
EXPOSE 5000
# http.client asks no proxy, as urllib would where the environment names one.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", "\
import http.client, os, sys; \
service = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('KVX_PORT', 5000)), timeout=4); \
service.request('GET', '/health'); \
sys.exit(service.getresponse().status != 200)"]
ENTRYPOINT ["kvx", "serve", "--host", "0.0.0.0"]
