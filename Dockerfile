# An image with the command diffuse; docs/howto/docker.md has the commands.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY diffusion_cli diffusion_cli
COPY conf conf
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
# torch compiles networks on GPUs, and diffuse its C code on CPUs.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG EXTRAS=
# Index address of the CPU build of torch, which pip reads from this variable.
ARG PIP_EXTRA_INDEX_URL=
# Some bases mark their Python as managed by Debian; in an image nothing else uses it.
ARG PIP_BREAK_SYSTEM_PACKAGES=1
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install "diffuse-cli[${EXTRAS}] @ file://$(echo /wheels/*.whl)"
# Any user may run the image: without an entry in /etc/passwd, libraries read the name and the home folder from these.
RUN useradd diffuse && mkdir --mode=1777 /home/diffuse
USER diffuse
ENV HOME=/home/diffuse USER=diffuse
WORKDIR /home/diffuse
ENTRYPOINT ["diffuse"]
