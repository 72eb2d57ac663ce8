# docker build -t llava-convert --build-arg TORCH_PIP_ARGS="--index-url …" .
# docker run --rm -v "$PWD:/work" llava-convert pth iter_N.pth --to hf
# With the caches of the hubs: -v "$HOME/.cache:/home/user/.cache". As yourself: --user "$(id -u):$(id -g)".

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/venv
# torch alone first: by TORCH_PIP_ARGS take a build for CPUs, a tenth of the size, since nothing here computes on a GPU.
ARG TORCH_PIP_ARGS=""
COPY constraints.txt .
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_PIP_ARGS} torch
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[digest,https,llamacpp,modelscope,s3]"

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 1000 --create-home user
USER 1000
WORKDIR /work
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["llava-convert"]
CMD ["--help"]
